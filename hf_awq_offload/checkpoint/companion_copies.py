"""Copies the files that come along with a checkpoint (companion_files.py says which), and never overwrites one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from ..logs import get_logger
from ..messages import shortened
from .companion_files import (
    TOKENIZER_CONFIG_NAME,
    Companions,
    Reason,
    companions,
    is_of_processor,
    is_of_tokenizer,
    why_left_out,
)
from .file_states import FileStates

logger = get_logger(__name__)

MOST_NAMED = 12
"""Names to log at most."""


def listed(
    folder: Path,
    but_not: Path | None = None,
) -> tuple[dict[str, int | None], dict[str, str]]:
    """Lists the files of a checkpoint on this machine, without hidden folders and caches.

    Links are followed within the folder; within the cache of the Hub, which keeps files elsewhere, within the
    repository. A link that leads anywhere else is not: a checkpoint from strangers could otherwise have any file of
    this machine copied, and published.

    Args:
        folder: the checkpoint.
        but_not: a folder inside it to pass over, such as the one that is being written.

    Returns:
        Sizes in bytes by path relative to `folder`, with "/"; and paths that can't be copied -> why.
    """
    root, passed_over = _reachable_from(folder), None if but_not is None else but_not.resolve()
    sizes: dict[str, int | None] = {}
    out_of_reach = {}
    for parent, folders, names in os.walk(folder, followlinks=False):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [
            name
            for name in folders
            if why_left_out(f"{name}/any", None) is not Reason.HIDDEN and Path(parent, name).resolve() != passed_over
        ]
        for name in (*names, *links):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            target = path.resolve()
            if not target.is_relative_to(root):
                out_of_reach[relative] = "a link out of the folder"
            elif target.is_file():
                if os.access(target, os.R_OK):
                    sizes[relative] = target.stat().st_size
                else:
                    out_of_reach[relative] = "not readable"
    return dict(sorted(sizes.items())), dict(sorted(out_of_reach.items()))


def companion_states(folders: Iterable[Path], apart_from: Iterable[str | os.PathLike[str] | None] = ()) -> FileStates:
    """Notes what the files are like that will come along from these folders, to copy them once a run is done.

    Args:
        folders: those of the checkpoint; one that does not exist holds nothing.
        apart_from: what the run itself writes to.
    """
    own = [Path(path).resolve() for path in apart_from if path is not None]
    states = FileStates()
    for folder in folders:
        kept = companions(listed(folder)[0], lambda path, folder=folder: read_text(folder / path)).kept  # type: ignore[misc]
        found = [folder / path for path in kept]
        states.add(file for file in found if not any(file.resolve().is_relative_to(path) for path in own))
    return states


def copy_companions(source: Path, chosen: Iterable[str], target: Path, *, is_second: bool = False) -> list[str]:
    """Copies files that `target` lacks; returns their paths.

    A tokenizer or processor that `target` has already is complete: no file of the source's is mixed with it.

    Args:
        source: folder of the checkpoint.
        chosen: the files' paths relative to it, with "/".
        target: folder of the new checkpoint.
        is_second: files of another folder of the same checkpoint have been copied before: any file of a tokenizer that
            is there is that one's.
    """
    there = listed(target)[0] if target.is_dir() else {}
    has_tokenizer = TOKENIZER_CONFIG_NAME in there or (is_second and any(map(is_of_tokenizer, there)))
    has_processor = any(map(is_of_processor, there))
    copied = []
    for path in chosen:
        if (has_tokenizer and is_of_tokenizer(path)) or (has_processor and is_of_processor(path)):
            continue
        copy = target / path
        if os.path.lexists(copy):
            continue
        if not copy.parent.resolve().is_relative_to(target.resolve()):
            logger.warning(f"Not copied to {target}: {path}. {copy.parent} is a link out of this folder.")
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, copy)
        copied.append(path)
    return copied


def copy_all_companions(source: Path, target: Path, *, same_model: bool = False) -> list[str]:
    """Copies all files of a folder that come along with its model to `target`, and tells what stays behind.

    Args:
        source: folder of the checkpoint.
        target: folder of the new checkpoint.
        same_model: see `companions`.

    Returns:
        Paths of the files that were copied, relative to both folders.
    """
    sizes, out_of_reach = listed(source, but_not=target)
    found = companions(sizes, lambda path: read_text(source / path), same_model=same_model)
    copied = copy_companions(source, found.kept, target)
    tell(str(source), found, out_of_reach)
    return copied


def tell(source: str, found: Companions, out_of_reach: Mapping[str, str] | None = None) -> None:
    """Logs what stays behind and is not clearly weights, and what could not be copied; see `listed`."""
    told: dict[str, str] = {}
    for path, reason in found.told.items():
        if reason is Reason.OTHER_MODEL:
            told.setdefault(f"{PurePosixPath(path).parent}/", reason.value)
        else:
            told[path] = reason.value
    told |= out_of_reach or {}
    if told:
        shown = shortened([f"{path} ({reason})" for path, reason in told.items()], MOST_NAMED)
        logger.warning(f"Not copied from {source}: {shown}. Copy those that the model needs by hand.")


def read_text(path: Path) -> str:
    """Returns a file's text, "" if there is no such file; what is no UTF-8 in it is replaced.

    Raises:
        CheckpointError: the file can't be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}. Correct its permissions.") from error


def is_reachable(path: Path, folder: Path) -> bool:
    """Whether a file is in a checkpoint's folder, and no link out of it; see `listed`."""
    return path.is_file() and path.resolve().is_relative_to(_reachable_from(folder))


def _reachable_from(folder: Path) -> Path:
    """Returns the folder that links in a checkpoint may lead to: its own, or the repository's in the Hub's cache."""
    resolved = folder.resolve()
    for parent in (resolved, *resolved.parents):
        if parent.name.startswith("models--") and resolved.is_relative_to(parent / "snapshots"):
            return parent
    return resolved
