"""Where a quantization has its layers, its results and its hidden states.

in memory   a finished layer stays in RAM, where the model is returned from, or goes to the caller's offload_folder
streamed    a finished layer is committed to the journal and let go of; the journal's files become the checkpoint
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from .errors import StorageError
from .hidden_states import HiddenStates, HiddenWriter
from .journal import Journal, LayerCommit
from .layer_quantization import LayerContext, restore_layer
from .offload_folder import OffloadFolder
from .report import LayerReport
from .streaming import Onloader

ToCheckpoint = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Tensors by names in the model -> as the checkpoint has them."""


class Workplace:
    """See the module.

    Args:
        onloader: brings layers to the execution device.
        journal: what is done so far; None forgets it.
        to_checkpoint: streams: what the journal is given are tensors of the checkpoint. None: the model stays in RAM.
        spill_bytes: hidden states of more go to a file.
        scratch: the folder for that file; None takes the system's for temporary files.
        offload: where layers of the model that is returned stay on the disk.
    """

    def __init__(
        self,
        onloader: Onloader,
        journal: Journal | None = None,
        to_checkpoint: ToCheckpoint | None = None,
        spill_bytes: float = float("inf"),
        scratch: Path | None = None,
        offload: OffloadFolder | None = None,
    ):
        assert journal is not None or to_checkpoint is None
        self.onloader = onloader
        self.journal = journal
        self.to_checkpoint = to_checkpoint
        self.spill_bytes = spill_bytes
        self.offload = offload
        self._scratch_parent = scratch
        self._scratch: Path | None = None
        self._spills = False
        self._spilled: list[Path] = []

    @property
    def commits(self) -> Mapping[str, LayerCommit]:
        """Layers that an earlier run has quantized, by name."""
        return {} if self.journal is None else dict(self.journal.commits)

    # -- finished layers -------------------------------------------------------------------------------------------

    def take_over(
        self,
        index: int,
        report: LayerReport,
        left_out: dict[str, str],
        batch_tokens: int,
        hidden: HiddenWriter | None,  # what enters the layer that follows
    ) -> None:
        """Have a layer, which is onloaded and quantized, where finished layers go.

        Raises:
            StorageError: the journal can't be written to; what it held before is whole.
        """
        name = report.name
        layer = self.onloader.model.get_submodule(name)
        if self.journal is not None:
            tensors = {f"{name}.{key}": value.detach().cpu() for key, value in layer.state_dict().items()}
            if self.to_checkpoint is not None:
                tensors = self.to_checkpoint(tensors)
            entry = {"layer": asdict(report), "left_out": left_out}
            self.journal.commit(index, name, tensors, batch_tokens, entry, hidden)
        if self._stays_on_disk(name):
            self._put_on_disk(
                name, {key: value.detach() for key, value in layer.named_parameters(remove_duplicate=False)}
            )
        if self.to_checkpoint is None and not self._stays_on_disk(name):
            self.onloader.keep(name)
        else:
            self.onloader.let_go(name)

    def install(self, commits: Sequence[LayerCommit], context_of: Callable[[str], LayerContext]) -> None:
        """Put layers that an earlier run has quantized into the model; their tensors only if it stays in RAM."""
        for commit in commits:
            context, report = context_of(commit.name), LayerReport.from_dict(commit.report["layer"])
            if self.to_checkpoint is not None:
                restore_layer(context, report, None)
                continue
            state = {name.removeprefix(f"{commit.name}."): value for name, value in commit.tensors().items()}
            if self._stays_on_disk(commit.name):
                restore_layer(context, report, None)
                self._put_on_disk(commit.name, state)
            else:
                restore_layer(context, report, state)
                self.onloader.is_in_ram(commit.name)

    def _stays_on_disk(self, layer_name: str) -> bool:
        return self.offload is not None and self.offload.has(layer_name)

    def _put_on_disk(self, layer_name: str, tensors: Mapping[str, Tensor]) -> None:
        assert self.offload is not None
        self.offload.put(layer_name, {f"{layer_name}.{name}": value for name, value in tensors.items()})

    # -- hidden states ---------------------------------------------------------------------------------------------

    def settled(self, states: HiddenStates) -> HiddenStates:
        """Of the first layer: to a file, if they are many."""
        size_bytes = sum(batch.numel() * batch.element_size() for batch in states.batches)
        self._spills = size_bytes > self.spill_bytes
        if not self._spills:
            return states
        writer = self.scratch_writer(0)
        for batch in states.batches:
            writer.append(batch)
        return self.written(0, writer)

    def hidden_writer(self, index: int) -> HiddenWriter:
        """Takes what enters the layer of this index."""
        return self.scratch_writer(index) if self.journal is None else self.journal.hidden_writer(index)

    def scratch_writer(self, index: int) -> HiddenWriter:
        """The same, for hidden states that no later run needs."""
        if not self._spills:
            return HiddenWriter()
        try:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="hf_awq_offload-", dir=self._scratch_parent))
            return HiddenWriter(self._scratch / f"hidden-{index}.bin")
        except OSError as error:
            raise StorageError(
                f"The hidden states can't be written to a temporary file: {error}. Name another folder for such files "
                "in the environment variable TMPDIR."
            ) from error

    def written(self, index: int, writer: HiddenWriter) -> HiddenStates:
        """What a writer was given, once its layer is finished."""
        committed = None if self.journal is None else self.journal.hidden(index)
        if committed is not None:
            return committed
        states = writer.finish()
        if states.file is not None:
            for older in self._spilled:
                older.unlink(missing_ok=True)  # what is mapped stays readable
            self._spilled = [states.file]
        return states

    def has_hidden(self, index: int) -> bool:
        """Whether an earlier run has left what enters the layer of this index."""
        return self.journal is not None and self.journal.hidden(index) is not None

    def hidden(self, index: int) -> HiddenStates:
        states = None if self.journal is None else self.journal.hidden(index)
        assert states is not None
        return states

    def close(self) -> None:
        """Let go of what was read ahead, of temporary files, and of the journal, which another run may then have."""
        self.onloader.close()
        if self.journal is not None:
            self.journal.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
