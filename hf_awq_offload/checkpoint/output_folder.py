"""Decides whether a finished checkpoint may replace a folder; refuses whatever is not clearly a checkpoint.

A folder is replaced as a whole, so everything in it is deleted. It may be replaced only if it holds a checkpoint and
nothing else: config.json, names that transformers, this package or a server's model repository give their files,
weights that the checkpoint's index names, and copies of files that the source still has. An adapter is no part of the
checkpoint: somebody trained it.
"""

from __future__ import annotations

import filecmp
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError
from ..json_text import parse_json
from .companion_files import Reason, why_left_out

PathLike = str | os.PathLike[str]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
CHECKPOINT_NAMES = re.compile(
    r"""
    ((awq|gptq)_)?(model|consolidated)[-.\w]*\.safetensors(\.index\.json)? | pytorch_model.*\.bin(\.index\.json)?
    | (generation_|preprocessor_|processor_|video_preprocessor_|image_processor_|quantize_|quant_)?config\.json
    | (tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json
    | (merges|vocab)\.txt | vocab\.bpe | normalizer\.json | \w+\.(tiktoken|spm) | chat_template\.jinja
    | (tokenizer|spiece|sentencepiece|spm)\.(bpe\.)?model
    | (configuration|modeling|tokenization|processing|image_processing|video_processing)_\w+\.py
    | README\.md | \.gitattributes | (LICENSE|NOTICE|USE_POLICY)(\.md|\.txt)? | awq_losses\.png
    """,
    re.VERBOSE,
)
WRITTEN_NAMES = re.compile(
    r".+\.safetensors(\.index\.json)?|(generation_)?config\.json|README\.md|awq_losses\.png|.+\.partial"
)
"""What saving a model overwrites; other files that are there stay."""
NEVER_COPIED = frozenset([Reason.HIDDEN, Reason.TRAINING, Reason.DATA, Reason.PRIVATE])
CHECKPOINT_FOLDERS = {"additional_chat_templates": re.compile(r".+\.jinja")}
"""Folder inside a checkpoint -> names of the files in it."""


def foreign_entry(folder: Path, sources: Sequence[Path] = ()) -> Path | None:
    """Returns something in `folder` that is not part of a checkpoint; None if it is empty or a checkpoint alone.

    A folder with files of a checkpoint, but without config.json, is foreign as a whole.

    Args:
        folder: the folder to look into.
        sources: folders whose files come along with the checkpoint: a copy of one, in the same place, is not foreign.
    """
    entries = sorted(folder.iterdir())
    indexed = _indexed(folder)
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and (entry.name in CHECKPOINT_FOLDERS or sources):
            names = CHECKPOINT_FOLDERS.get(entry.name)
            inside = sorted(path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir())
            for path in inside:
                is_named = names is not None and path.parent == entry and _is_named(path, names)
                if not is_named and not _came_along(path, folder, sources):
                    return path
            if not inside and names is None:
                return entry
        elif not (
            _is_named(entry, CHECKPOINT_NAMES)
            or (entry.name in indexed and entry.is_file())
            or _came_along(entry, folder, sources)
        ):
            return entry
    return entries[0] if entries and not (folder / CONFIG_NAME).is_file() else None


def _is_named(path: Path, names: re.Pattern[str]) -> bool:
    return path.is_file() and names.fullmatch(path.name) is not None


def _indexed(folder: Path) -> set[str]:
    """Returns the names of the weight files that the checkpoint's own index lists."""
    try:
        listed = parse_json((folder / INDEX_NAME).read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that names nothing
        return set()
    return {name for name in listed if isinstance(name, str) and name.endswith(".safetensors")}


def _came_along(path: Path, folder: Path, sources: Sequence[Path]) -> bool:
    """Whether a file of the checkpoint in `folder` is a copy of a source's, which would be copied again."""
    relative = path.relative_to(folder)
    if not path.is_file() or why_left_out(relative.as_posix(), None) in NEVER_COPIED:
        return False
    originals = [source / relative for source in sources]
    return any(original.is_file() and filecmp.cmp(path, original, shallow=False) for original in originals)


def output_folder(
    path: PathLike,
    overwrite: bool,
    *,
    field: str = "out_dir",
    remedy: str | None = "overwrite=True",
    kept: Mapping[str, PathLike | None] | None = None,
    sources: Sequence[Path] = (),
) -> Path:
    """Returns the folder that a result goes to, absolute, links resolved, once it is safe to put the result there.

    Args:
        path: what the user gave.
        overwrite: whether a checkpoint that is there may be replaced.
        field: what the user calls `path`.
        remedy: what the user passes to replace a checkpoint; None if there is no such option.
        kept: what the user calls a path -> that path; neither it nor anything above it may be replaced.
        sources: see `foreign_entry`.

    Raises:
        ConfigError: `path` is empty, a file or below one, the working directory, a home or a mount point, or above one
            of these; it holds one of `kept`; it is not empty and may not be replaced. Nothing was changed.
    """
    if not os.fspath(path):
        raise ConfigError(f"{field} is empty; name the folder for the result.")
    try:
        target = Path(os.path.realpath(path))
        target.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field} is {os.fspath(path)[:200]!r}, which can't be a folder ({error}).") from error
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{field} {path} is a file; name a folder.")
    above = next(folder for folder in (target, *target.parents) if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{field} {path} is below {above}, which is a file; name another folder.")
    reason = _why_irreplaceable(target, kept or {})
    if reason is not None:
        raise ConfigError(f"{field} {path} {reason}; nothing was changed. Name a folder of its own for the result.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            instead = f", or pass {remedy} to replace the checkpoint in it" if remedy is not None else ""
            raise ConfigError(
                f"{field} {path} exists and is not empty; nothing was changed. Name another folder{instead}."
            )
        foreign = foreign_entry(target, sources)
        if foreign is not None:
            raise ConfigError(
                f"{field} {path} cannot be replaced: {foreign.relative_to(target)} is not part of a checkpoint, and "
                "would be deleted. Nothing was changed. Name another folder, or move that file elsewhere."
            )
    return target


def require_no_links(folder: Path) -> None:
    """Checks that saving a model to an existing folder overwrites no file elsewhere, such as those of the Hub's cache.

    Raises:
        ConfigError: a file that would be written is a link. Nothing was changed.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() and WRITTEN_NAMES.fullmatch(path.name):
            raise ConfigError(
                f"{folder} holds {path.name}, a link to {os.readlink(path)}, which would be overwritten; nothing was "
                "changed. Save to another folder, or remove the link."
            )


def _why_irreplaceable(target: Path, kept: Mapping[str, PathLike | None]) -> str | None:
    """Returns why nothing may ever replace `target`, whatever is in it; None if something may."""
    if os.path.ismount(target):
        return "is a mount point"
    if any(_resolved(entry.pw_dir) == target for entry in pwd.getpwall()):
        return "is a home folder"
    for name, path in {"the working directory": Path.cwd(), "your home folder": Path.home(), **kept}.items():
        if path is None or not _resolved(path).is_relative_to(target):
            continue
        return f"is {name}" if _resolved(path) == target else f"holds {name} ({os.fspath(path)})"
    return None


def _resolved(path: PathLike) -> Path:
    return Path(os.path.realpath(path))
