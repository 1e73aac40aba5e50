"""Brings the files of a model that come along with its weights into the folder that the model is saved in.

They come from where its weights came from: the folder, or the commit on the Hub. From the Hub, only those files are
downloaded that come along. If it cannot be reached, those in the cache are taken.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from ..checkpoint.companion_copies import copy_companions, listed, read_text, tell
from ..checkpoint.companion_files import Companions, companions
from ..checkpoint.durable import replacing
from ..checkpoint.source_folders import folder_on_this_machine
from ..json_text import parse_json
from ..logs import get_logger
from .model_card import hub_id
from .origin import TOKENIZER_MARKERS, Origin

logger = get_logger(__name__)

DOWNLOADING = ("cache_dir", "force_download", "local_files_only", "token")
"""Arguments of `from_pretrained` that huggingface_hub's functions take, too."""
WITH_CODE = (
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "generation_config.json"),
)
"""Files that may say, in `auto_map`, which code goes with the model."""


def bring_companions(origin: Origin, folder: Path) -> None:
    """Copies everything that comes along with a model to `folder`, where existing files stay as they are.

    If the model is in a subfolder of its repository, the files in that folder are copied, then those of the repository
    around it that the folder does not have, such as a licence, or a tokenizer that several models share.
    """
    found = _found(origin, folder)
    if found is None:
        return
    source, sizes, out_of_reach, text_of = found
    inside = f"{origin.subfolder}/" if origin.subfolder else ""
    own = {path.removeprefix(inside): size for path, size in sizes.items() if path.startswith(inside)}
    layers = [(inside, companions(own, lambda path: text_of(inside + path)))]
    if inside:
        around = {path: size for path, size in sizes.items() if not path.startswith(inside)}
        layers.append(("", companions(around, text_of)))
    copied: list[str] = []
    for index, (prefix, chosen) in enumerate(layers):
        if chosen.kept:
            base = source([prefix + path for path in chosen.kept]) / prefix
            there = [path for path in chosen.kept if (base / path).is_file()]
            copied += copy_companions(base, there, folder, is_second=index > 0)
        tell(origin.source, _beside(prefix, chosen), out_of_reach if index == 0 else None)
    if copied:
        logger.info(f"Copied from {origin.source}: {', '.join(copied)}.")
    _name_local_code(folder, origin)


def _beside(prefix: str, chosen: Companions) -> Companions:
    """Returns the same with paths relative to the repository."""
    return Companions(chosen.kept, {prefix + path: reason for path, reason in chosen.left_out.items()})


_Found = tuple[Callable[[list[str]], Path], dict[str, int | None], dict[str, str], Callable[[str], str]]
"""Downloads files and returns the folder they are in; sizes by path; what can't be copied -> why; reads a file."""


def _found(origin: Origin, folder: Path) -> _Found | None:
    """Lists the files at a model's origin; None if there is nothing to list, which is logged if it is a loss."""
    if not origin.source:
        return None
    if os.path.isdir(origin.source):
        return _on_this_machine(Path(origin.source), folder)
    repository = hub_id(origin.source)
    if repository is None:
        return None
    options: dict[str, Any] = {name: origin.arguments[name] for name in DOWNLOADING if name in origin.arguments}
    revision = origin.revision
    cached = folder_on_this_machine(repository, revision, origin.arguments.get("cache_dir"), origin.subfolder)
    try:
        if options.get("local_files_only"):
            raise OSError("local_files_only is set")
        tree = HfApi(token=options.get("token")).list_repo_tree(repository, recursive=True, revision=revision)
        sizes = {entry.path: size for entry in tree if (size := getattr(entry, "size", None)) is not None}
    except Exception as error:  # of any kind: no network, no authorization, no such repository
        if cached is not None:
            return _on_this_machine(cached, folder)
        has_tokenizer = any((folder / name).exists() for name in TOKENIZER_MARKERS)
        logger.warning(
            f"The files of {repository} could not be listed ({type(error).__name__}), and are not in the cache. Saving "
            f"without them{'' if has_tokenizer else ', and without a tokenizer: save one there as well'}."
        )
        return None

    def text_of(path: str) -> str:
        return read_text(download([path]) / path) if path in sizes else ""

    def download(paths: list[str]) -> Path:
        patterns = [glob.escape(path) for path in paths]
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **options))
        except Exception as error:  # of any kind; what is in the cache is better than nothing
            there = cached or folder
            missing = [path for path in paths if not (there / path).is_file()]
            if missing:
                logger.warning(
                    f"Not downloaded from {repository} ({type(error).__name__}), and so not saved with the model: "
                    f"{', '.join(missing)}. Save the model once more when the Hub can be reached."
                )
            return there

    return download, sizes, {}, text_of


def _on_this_machine(source: Path, folder: Path) -> _Found:
    sizes, out_of_reach = listed(source, but_not=folder)
    return lambda paths: source, sizes, out_of_reach, lambda path: read_text(source / path)


def _name_local_code(folder: Path, origin: Origin) -> None:
    """Has `auto_map` name the code in `folder` instead of the code in the repository that it was copied from.

    "org/name--module.Class" would load the code from the repository's main branch, whatever the model's revision.
    """
    prefix = f"{hub_id(origin.source)}--"
    for name in WITH_CODE:
        path = folder / name
        try:
            fields = parse_json(path.read_bytes())
            references = fields["auto_map"]
        except (OSError, ValueError, TypeError, KeyError):  # no such file, or nothing in it that we know
            continue
        changed = _without(prefix, references, folder)
        if changed != references:
            with replacing(path) as partial:
                fields["auto_map"] = changed
                partial.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without(prefix: str, references: Any, folder: Path) -> Any:
    """Returns references without the prefix where the module is in `folder`."""
    if isinstance(references, dict):
        return {name: _without(prefix, value, folder) for name, value in references.items()}
    if isinstance(references, Sequence) and not isinstance(references, str):
        return [_without(prefix, value, folder) for value in references]
    if isinstance(references, str) and references.startswith(prefix):
        local = references.removeprefix(prefix)
        return local if (folder / f"{local.partition('.')[0]}.py").is_file() else references
    return references
