"""Where the hidden states between two decoder layers are: in RAM, in a scratch file, or in the journal."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..errors import StorageError
from .hidden_states import HiddenStates, HiddenWriter
from .journal import Journal


class HiddenStorage:
    """Keeps the hidden states of a run, named by the index of the decoder layer that they enter.

    Args:
        journal: keeps what a later run needs to resume; None if no run will.
        spill_bytes: hidden states of more bytes than this go to a file.
        scratch: the folder for that file; None takes the system's folder for temporary files.
    """

    def __init__(self, journal: Journal | None = None, spill_bytes: float = float("inf"), scratch: Path | None = None):
        self._journal = journal
        self._spill_bytes = spill_bytes
        self._scratch_parent = scratch
        self._scratch: Path | None = None
        self._spills = False
        self._spilled: Path | None = None
        """The scratch file that holds the hidden states of now."""
        self._n_scratch_files = 0

    def keep_first(self, states: HiddenStates) -> HiddenStates:
        """Returns what enters the first layer, spilled to a file if it is large; later writers then spill as well."""
        size_bytes = sum(batch.numel() * batch.element_size() for batch in states.batches)
        self._spills = size_bytes > self._spill_bytes
        if not self._spills:
            return states
        writer = self.scratch_writer(0)
        for batch in states.batches:
            writer.append(batch)
        return self.written(0, writer)

    def writer(self, index: int) -> HiddenWriter:
        """Returns a writer for what enters the layer of this index; the layer's commit makes it durable."""
        return self.scratch_writer(index) if self._journal is None else self._journal.hidden_writer(index)

    def scratch_writer(self, index: int) -> HiddenWriter:
        """Returns a writer for hidden states that no later run needs.

        Raises:
            StorageError: the scratch file cannot be made.
        """
        if not self._spills:
            return HiddenWriter()
        try:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="hf_awq_offload-", dir=self._scratch_parent))
            self._n_scratch_files += 1  # no name twice: a file may be mapped still
            return HiddenWriter(self._scratch / f"hidden-{index}-{self._n_scratch_files}.bin")
        except OSError as error:
            raise StorageError(
                f"The hidden states cannot be written to a temporary file: {error}. Name another folder for such files "
                "in the environment variable TMPDIR."
            ) from error

    def written(self, index: int, writer: HiddenWriter) -> HiddenStates:
        """Returns what `writer` took, once its layer is committed."""
        committed = self.committed(index)
        return self.finished(writer) if committed is None else committed

    def finished(self, writer: HiddenWriter) -> HiddenStates:
        """Returns what a scratch writer took; deletes the scratch file before it."""
        states = writer.finish()
        if states.file is not None:
            if self._spilled is not None:
                self._spilled.unlink(missing_ok=True)
            self._spilled = states.file
        return states

    def committed(self, index: int) -> HiddenStates | None:
        """Returns what enters the layer of this index if the journal has it."""
        return None if self._journal is None else self._journal.hidden(index)

    def last_committed(self, index: int) -> int:
        """Returns the last layer up to `index` whose hidden states the journal has; 0 if it has none."""
        return next((earlier for earlier in range(index, 0, -1) if self.committed(earlier) is not None), 0)

    def batch_tokens_of(self, layer_name: str) -> int | None:
        """Returns the tokens of the micro-batches that a committed layer ran on; None if it is not committed."""
        commit = None if self._journal is None else self._journal.commits.get(layer_name)
        return None if commit is None else commit.batch_tokens

    def close(self) -> None:
        """Deletes the scratch files."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
