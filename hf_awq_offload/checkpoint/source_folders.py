"""Finds the folders on this machine that hold a checkpoint's files. Downloads nothing, and imports in no time."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from .companion_files import CONFIG_NAME


def folder_on_this_machine(
    source: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
) -> Path | None:
    """Returns the folder that holds a checkpoint: itself, or the Hub's repository in the cache; None if there is none.

    Nothing is downloaded, so the folder may lack files.

    Args:
        source: a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        cache_dir: the cache; by default huggingface_hub's.
        subfolder: where in the checkpoint the model is.
    """
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import try_to_load_from_cache  # takes a while, and the command line asks for folders first

    name = str(PurePosixPath(subfolder, CONFIG_NAME))
    cache = None if cache_dir is None else Path(cache_dir)
    try:
        found = try_to_load_from_cache(os.fspath(source), name, cache_dir=cache, revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(found).parents[len(PurePosixPath(name).parts) - 1] if isinstance(found, str) else None


def places_of_files(
    source: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
) -> list[Path]:
    """Returns the folders on this machine whose files come along: the model's own first, then the one around it."""
    folder = folder_on_this_machine(source, revision, cache_dir, subfolder or "")
    if folder is None:
        return []
    return [folder / subfolder, folder] if subfolder else [folder]
