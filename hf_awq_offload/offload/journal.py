"""The journal of a run, on disk: a run that was killed resumes after its last committed decoder layer.

    journal.json                what the run is: the journal's format and a fingerprint of source, recipe and data
    journal.lock                is locked while a run writes to the journal, and says which process that is
    layer-00007.safetensors     the tensors of the eighth layer, quantized
    hidden-00008.bin            what enters the ninth, the bytes of all batches
    layer-00007.json            the commit: names, sizes and SHA-256 of both files, and the layer's report

Every file is written under another name and renamed. A thread flushes and hashes the files of a layer while the next
layer is worked on. It writes the commit last, so that a layer is either committed or absent. The journal keeps the
hidden states of the last two commits: if the newest are damaged, the run falls back one layer. A damaged older layer is
quantized again, on hidden states that forward passes of the original layers compute anew. Opening a journal checks its
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial as partial_call
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.durable import PARTIAL_SUFFIX, file_digest, holder_of, locked, replacing
from ..checkpoint.safetensors import read_tensor, tensor_places
from ..checkpoint.stored_tensor import HeldTensor, write_all
from ..errors import JournalError, StorageError
from ..logs import get_logger
from .durable_commit import write_commit
from .hidden_states import HiddenStates, HiddenWriter
from .journal_commits import hidden_name, layer_name, parse_regular, unsealed
from .journal_header import differences
from .one_behind import OneBehind

logger = get_logger(__name__)

FORMAT = 2
"""Goes up whenever the meaning of the files, or how layers are quantized from them, changes."""

HEADER_NAME = "journal.json"
LOCK_NAME = "journal.lock"


@dataclass(frozen=True)
class LayerCommit:
    """One committed decoder layer."""

    index: int
    name: str
    file: Path  # its tensors
    batch_tokens: int  # of the micro-batches that it ran in
    report: dict[str, Any]  # for the pipeline; JSON values

    def tensors(self) -> dict[str, Tensor]:
        return {name: read_tensor(place) for name, place in tensor_places(self.file).items()}


class Journal:
    """Keeps finished layers in a folder that one run at a time writes to; makes the folder if it is missing.

    Args:
        directory: the folder.
        fingerprint: part -> JSON value; covers what the result of every layer depends on.
        is_kept: a later run may resume from it. Otherwise nothing is hashed or flushed.

    Raises:
        JournalError: the folder belongs to another run, holds other files, or is in use.
        StorageError: it cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: Mapping[str, Any], is_kept: bool = True):
        self.is_kept = is_kept
        self.directory = Path(directory)
        self.header = {"format": str(FORMAT), **fingerprint}
        self.commits: dict[str, LayerCommit] = {}
        self._hidden: dict[int, dict[str, Any]] = {}
        self._lock: Any = None
        self._behind = OneBehind("journal")
        try:
            with _storage_errors(self.directory):
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / HEADER_NAME
        others = {entry.name for entry in self.directory.iterdir()} - {LOCK_NAME, HEADER_NAME + PARTIAL_SUFFIX}
        if others and not path.exists():
            raise JournalError(
                f"checkpoint_dir {self.directory} holds other files ({', '.join(sorted(others)[:3])}) and no "
                f"{HEADER_NAME}; expected an empty folder or a journal. Name another folder."
            )
        self._lock = _locked(self.directory)
        if path.exists():
            self._compare(path)
            self._read_commits()
        else:
            with replacing(path, flush=self.is_kept) as partial:
                partial.write_text(json.dumps(self.header, indent=2, default=str), encoding="utf-8")

    # -- reading ---------------------------------------------------------------------------------------------------

    def hidden(self, index: int) -> HiddenStates | None:
        """Returns what enters the layer of this index, if the journal has it."""
        entry = self._hidden.get(index)
        if entry is None:
            return None
        dtype = getattr(torch, entry["dtype"])
        return HiddenStates.from_file(self.directory / entry["file"], entry["shapes"], dtype)

    def _compare(self, path: Path) -> None:
        try:
            existing = parse_regular(path)
            if not isinstance(existing, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise JournalError(
                f"{path} can't be read ({error}); delete the folder to quantize from the start."
            ) from error
        different = differences(existing, self.header)
        if different:
            raise JournalError(
                f"checkpoint_dir {self.directory} is the journal of another run: these differ: {different}. Nothing "
                "was changed. Repeat that run's call to finish it, name another folder, or delete this one."
            )

    def _read_commits(self) -> None:
        for path in sorted(self.directory.glob("layer-*.json")):
            try:
                entry = unsealed(path)
                index, hidden = entry["index"], entry["hidden"]
                commit = LayerCommit(
                    index, entry["name"], path.with_suffix(".safetensors"), entry["batch_tokens"], entry["report"]
                )
                damaged = not self._is_whole(entry["tensors"])
                if not damaged:
                    tensor_places(commit.file)
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s can't be read (%s); that layer is quantized again.", path, error)
                continue
            if damaged:
                logger.warning("%s is damaged or missing; that layer is quantized again.", commit.file)
                continue
            self.commits[commit.name] = commit
            if hidden is None or not (self.directory / hidden["file"]).exists():
                continue
            if self._is_whole(hidden):
                self._hidden[index + 1] = hidden
            else:
                logger.warning("%s is damaged; the run goes back to earlier hidden states.", hidden["file"])

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        path = self.directory / entry["file"]
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        return file_digest(path) == entry["sha256"]

    # -- writing ---------------------------------------------------------------------------------------------------

    def hidden_writer(self, index: int) -> HiddenWriter:
        """Returns a writer for what enters the layer of this index; `commit` makes it durable."""
        with _storage_errors(self.directory):
            return HiddenWriter(self.directory / (hidden_name(index) + PARTIAL_SUFFIX))

    def commit(
        self,
        index: int,
        name: str,
        tensors: Mapping[str, Tensor],
        batch_tokens: int,
        report: dict[str, Any],
        hidden: HiddenWriter | None,  # closed by this; None: nothing that comes later needs them
    ) -> LayerCommit:
        """Writes a layer's files, and starts making them durable, all of the layer or nothing; see `settle`.

        If the journal is not kept, writing the files is all. At most one layer is on its way: this waits for the one
        before it.

        Raises:
            StorageError: the disk is full, or a file of this layer or of the one before it cannot be written; earlier
                commits are intact.
        """
        self.settle()
        file = self.directory / layer_name(index)
        entry: dict[str, Any] = {"index": index, "name": name, "batch_tokens": batch_tokens, "report": report}
        with _storage_errors(self.directory):
            with replacing(file, flush=False) as partial:
                write_all(partial, {key: HeldTensor(value) for key, value in tensors.items()}, flush=False)
            entry["hidden"] = None if hidden is None else self._keep(hidden, index + 1)
            if entry["hidden"] is not None:
                self._hidden[index + 1] = entry["hidden"]
        obsolete = [self._hidden.pop(earlier) for earlier in sorted(self._hidden) if earlier < index]
        self._behind.start(partial_call(self._finish, file, entry, obsolete))
        if not self.is_kept:
            self.settle()
        commit = LayerCommit(index, name, file, batch_tokens, report)
        self.commits[name] = commit
        return commit

    def settle(self) -> None:
        """Waits until all commits are durable.

        Raises:
            StorageError: the last one could not be made durable; earlier commits are intact.
        """
        self._behind.wait()

    def _keep(self, hidden: HiddenWriter, index: int) -> dict[str, Any]:
        hidden.close()
        assert hidden.file is not None
        assert hidden.dtype is not None
        target = self.directory / hidden_name(index)
        os.replace(hidden.file, target)
        dtype = str(hidden.dtype).removeprefix("torch.")
        return {"file": target.name, "bytes": target.stat().st_size, "shapes": hidden.shapes, "dtype": dtype}

    def _finish(self, file: Path, entry: dict[str, Any], obsolete: Sequence[Mapping[str, Any]]) -> None:
        with _storage_errors(self.directory):
            if self.is_kept:
                write_commit(file, entry)
            for hidden in obsolete:
                (self.directory / hidden["file"]).unlink(missing_ok=True)

    # -- the end ---------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Removes the journal's own files, and the folder if nothing else is in it; closes the journal.

        What can't be removed stays, with a warning: the result, which is complete by now, matters more.
        """
        self._behind.close()
        try:
            _remove_files(self.directory)
            self.close()
            _remove_folder(self.directory)
        except OSError as error:
            self.close()
            logger.warning(
                f"The result is complete, but its journal {self.directory} can't be removed: {error}. "
                "Delete that folder."
            )

    def close(self) -> None:
        """Lets the last commit become durable, and releases the folder for other runs."""
        try:
            self.settle()
        except Exception as error:  # whoever closes without `settle` has failed already
            logger.warning("The last layer was not stored: %s", error)
        finally:
            self._behind.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None


def committed_layers(directory: str | os.PathLike[str]) -> int | None:
    """Counts the decoder layers in the journal of a folder, unchecked; None if there is no journal."""
    folder = Path(directory)
    return len(list(folder.glob("layer-*.json"))) if (folder / HEADER_NAME).exists() else None


def require_unused(directory: str | os.PathLike[str]) -> None:
    """Raises JournalError if a run is writing to the journal of a folder."""
    folder = Path(directory)
    if (folder / LOCK_NAME).exists():
        with _storage_errors(folder):
            lock = _locked(folder)
        if lock is not None:
            lock.close()


def discard_if_empty(directory: str | os.PathLike[str]) -> None:
    """Removes a journal that no run uses and none can resume from: it has no committed layer."""
    folder = Path(directory)
    if committed_layers(folder) != 0:
        return
    try:
        lock = _locked(folder)
    except (JournalError, OSError):  # in use, or not ours to remove
        return
    if committed_layers(folder) == 0:
        _remove_files(folder)
    if lock is not None:
        lock.close()
    if committed_layers(folder) is None:
        _remove_folder(folder)


def _locked(directory: Path) -> Any:
    """Takes the journal of a folder for this process; see `locked`.

    Raises:
        JournalError: another process has it.
    """
    path = directory / LOCK_NAME
    try:
        return locked(path)
    except BlockingIOError as error:
        raise JournalError(
            f"checkpoint_dir {directory} is in use by {holder_of(path)}; wait until that run is done, or name another "
            "folder. Don't delete this one: that would end the run."
        ) from error


def _remove_files(directory: Path) -> None:
    for pattern in ("layer-*.json", "layer-*.safetensors", "hidden-*.bin", f"*{PARTIAL_SUFFIX}", HEADER_NAME):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def _remove_folder(directory: Path) -> None:
    (directory / LOCK_NAME).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: the rest is not ours
        directory.rmdir()


class _storage_errors:
    """Turns a failed write into a StorageError that says what to do."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(
                f"Writing to {self.directory} failed: {error}. What was committed before is whole: make room or "
                "correct the folder's permissions, and repeat the call to resume."
            ) from error
