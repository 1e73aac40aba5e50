"""Says where a model comes from: which repository at which commit, or which folder, and how the Hub is reached.

The weights are read first. Tokenizer, processor and all files that come along are read from the very commit that they
were read from, although a branch may have moved on when a model is saved, hours later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from ..checkpoint.companion_files import PROCESSOR_FILES
from ..errors import CheckpointError
from .load_call import can_be_asked, enclosing_call
from .model_card import hub_id

COMMIT = re.compile(r"[0-9a-f]{40}")
IN_CACHE = re.compile(r"(?P<cache>.*)/models--[^/]+/snapshots/(?P<commit>[0-9a-f]{40})/(?P<path>.*)")
"""Matches a file in the cache of the Hub."""
EVERYWHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")
"""Arguments that also apply to another repository, such as that of a tokenizer the user has named."""
SECRET = ("token", "proxies")
TOKENIZER_MARKERS = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model", "merges.txt", "tiktoken.model", "vocab.model"),
)
PROCESSOR_MARKERS = tuple(name for name in PROCESSOR_FILES if name.endswith("config.json"))


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, and the arguments with which its other files are loaded.

    The token stays in memory: it is neither in the text of an origin nor in a pickle.
    """

    source: str
    """Folder, or name on the Hub; empty if it is not known."""
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Those in `load_call.HUB_ARGUMENTS` that were passed."""
    commit: str | None = None
    """What the weights were read from; None for a folder, or if it is not known."""

    @property
    def subfolder(self) -> str:
        """Folder of the model in the checkpoint, "" for its root."""
        parts = PurePosixPath(str(self.arguments.get("subfolder") or "")).parts
        return "/".join(part for part in parts if part != ".")

    @property
    def revision(self) -> str | None:
        """What to read files of this model from: its commit, else what the user has named."""
        return self.commit or self.arguments.get("revision")

    @property
    def revision_name(self) -> str | None:
        """Branch or tag that the user has named; None if that was a commit, or nothing."""
        revision = self.arguments.get("revision")
        named = getattr(revision, "initial", revision)
        return None if named is None or COMMIT.fullmatch(named) else str(named)

    @property
    def arguments_elsewhere(self) -> dict[str, Any]:
        """Arguments for loading from another repository: revision and subfolder are this one's."""
        return _answered({name: value for name, value in self.arguments.items() if name in EVERYWHERE})

    def arguments_here(self, in_subfolder: bool) -> dict[str, Any]:
        """Returns arguments for loading something else of this model: from its subfolder, or from the root."""
        arguments = {name: value for name, value in self.arguments.items() if name != "subfolder"}
        if not os.path.isdir(self.source) and self.revision is not None:
            is_resolved = getattr(arguments.get("revision"), "resolved", None) == self.commit
            arguments["revision"] = arguments["revision"] if self.commit and is_resolved else self.revision
        return _answered(arguments | ({"subfolder": self.subfolder} if in_subfolder and self.subfolder else {}))

    def holds_any(self, names: Iterable[str], in_subfolder: bool) -> bool:
        """Whether the subfolder, or the root, holds one of these files."""
        arguments = self.arguments_here(in_subfolder)
        for name in ("trust_remote_code", "code_revision", "force_download"):
            arguments.pop(name, None)
        quiet: dict[str, Any] = {
            "_raise_exceptions_for_gated_repo": False,
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        return any(cached_file(self.source, name, **arguments, **quiet) is not None for name in names)

    def load(self, auto_class: Any, markers: Iterable[str], config: Any = None) -> Any:
        """Loads the model's own tokenizer or processor.

        If the model is in a subfolder, its tokenizer is expected there, too. If the subfolder holds none, that in the
        root of the repository is taken, which several models then share.

        Args:
            auto_class: AutoTokenizer or AutoProcessor.
            markers: names of files of which there is at least one where there is a tokenizer.
            config: the model's; the root may have none. By default it is loaded if it is needed.
        """
        if not self.subfolder or self.holds_any(markers, in_subfolder=True):
            return auto_class.from_pretrained(self.source, **self.arguments_here(in_subfolder=True))
        if config is None:
            config = AutoConfig.from_pretrained(self.source, **self.arguments_here(in_subfolder=True))
        return auto_class.from_pretrained(self.source, config=config, **self.arguments_here(in_subfolder=False))

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled with a model: everything but secrets."""
        kept = {name: value for name, value in self.arguments.items() if name not in SECRET}
        return {"source": self.source, "arguments": kept, "commit": self.commit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict) -> Origin:
        return self


def _answered(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments that say whether code may run, if nobody is there whom transformers could ask."""
    if arguments.get("trust_remote_code") is None and not can_be_asked():
        return arguments | {"trust_remote_code": False}
    return arguments


def _require_files_inside(model: PreTrainedModel, files: Iterable[str | os.PathLike[str]]) -> None:
    """Checks that the files that transformers has chosen lie in the folder that the model is loaded from.

    transformers follows the names in an index wherever they lead. Links in the folder are followed: its owner made
    them.

    Raises:
        CheckpointError: one lies elsewhere.
    """
    call = enclosing_call()
    subfolder = "" if call is None else str(call.arguments.get("subfolder") or "")
    source = str(model.config.name_or_path or "")  # of adapters, it is their base model's
    if not os.path.isdir(source):
        return
    sources = (source, "" if call is None else call.source)
    folders = [os.path.abspath(os.path.join(each, subfolder)) for each in sources if os.path.isdir(each)]
    for file in files:
        if not any(Path(os.path.abspath(file)).is_relative_to(folder) for folder in folders):
            raise CheckpointError(
                f"The checkpoint in {folders[0]} names the file {os.fspath(file)}, which is not in this folder. Don't "
                "use this checkpoint: its index or config.json reaches out of it."
            )


def origin_of(model: PreTrainedModel, checkpoint_files: Iterable[str | os.PathLike[str]] | None = None) -> Origin:
    """Returns where a model comes from that is being loaded, or that was loaded before.

    Args:
        model: its config says from which folder or repository.
        checkpoint_files: the files of its weights, if they are known. Their place in the Hub's cache tells the commit
            where nothing else does.

    Raises:
        CheckpointError: one of these files is not in the folder that the model is loaded from.
    """
    files = list(checkpoint_files or ())
    _require_files_inside(model, files)
    source = str(model.config.name_or_path or "")
    call = enclosing_call()
    if call is None and model in _origins:
        known = _origins[model]
        return known if known.source == source else Origin(source)
    arguments = {} if call is None else call.hub_arguments
    file = next((Path(path).absolute().as_posix() for path in files), "")
    in_cache = None if os.path.isdir(source) else IN_CACHE.fullmatch(file)
    revision = arguments.get("revision")
    commit = getattr(revision, "resolved", None) or getattr(model.config, "_commit_hash", None)
    if commit is None and isinstance(revision, str) and COMMIT.fullmatch(revision):
        commit = str(revision)
    if in_cache is not None:
        commit = commit or in_cache["commit"]
        arguments.setdefault("cache_dir", in_cache["cache"])
        if call is None and "/" in in_cache["path"]:
            arguments["subfolder"] = str(PurePosixPath(in_cache["path"]).parent)
    if hub_id(source) is None:
        commit = None
    elif os.path.isdir(source):
        snapshot = IN_CACHE.fullmatch(f"{Path(source).absolute().as_posix()}/")
        commit = None if snapshot is None else snapshot["commit"]
    return Origin(source, arguments, commit)


def remember_origin(model: PreTrainedModel) -> None:
    """Remembers, from inside the call that loads it, where a model comes from that may be quantized later.

    An Auto class calls the model's class, which knows more: it is asked first, and stays right.
    """
    if model not in _origins:
        _origins[model] = origin_of(model)


_origins: WeakKeyDictionary[PreTrainedModel, Origin] = WeakKeyDictionary()
