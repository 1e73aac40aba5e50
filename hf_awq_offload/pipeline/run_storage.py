"""Where a quantization has its layers, its results and its hidden states.

in memory   a finished layer stays in RAM, where the model is returned from, or goes to the caller's offload_folder
streamed    a finished layer is committed to the journal and let go of; the journal's files become the checkpoint
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.dataset import CalibrationSet
from ..config import AwqOffloadConfig
from ..errors import ConfigError, StorageError
from ..logs import get_logger
from ..offload.hidden_states import HiddenStates, HiddenWriter
from ..offload.journal import Journal, LayerCommit
from ..offload.memory import default_execution_device
from ..offload.offload_folder import OffloadFolder
from ..offload.onloader import Onloader
from ..offload.stored_weights import StoredWeights
from ..report import LayerReport
from .fingerprint import fingerprint
from .layer_quantization import LayerContext, restore_layer

logger = get_logger(__name__)

RAM_SHARE = 0.8
"""A checkpoint of more than this share of the free RAM stays on the disk."""
HIDDEN_SHARE = 0.25
"""Hidden states of more than this share of the free RAM go to a file: twice their size is needed while a layer runs."""

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


def execution_device(recipe: AwqOffloadConfig) -> torch.device:
    """Where a decoder layer is processed."""
    return default_execution_device() if recipe.execution_device is None else torch.device(recipe.execution_device)


def free_ram_bytes(recipe: AwqOffloadConfig) -> int:
    """What may be used of the RAM: what is free, and no more than `max_memory` says."""
    available = int(psutil.virtual_memory().available)
    limit = recipe.memory_limit_bytes(torch.device("cpu"))
    return available if limit is None else min(available, limit)


def chosen_offload(recipe: AwqOffloadConfig, checkpoint_files: Sequence[str] | None, result_on_disk: bool) -> str:
    """ "cpu" or "disk"; where the quantized model is to stay on the disk, so does the one in full precision.

    Raises:
        ConfigError: the disk is asked for, but the checkpoint's files can't be read lazily.
    """
    files = [str(file) for file in checkpoint_files or ()]
    is_lazy = bool(files) and all(file.endswith(".safetensors") for file in files)
    wanted = "disk" if result_on_disk else recipe.offload
    if wanted == "disk" and not is_lazy:
        found = ", ".join(map(os.path.basename, files)) or "none"
        raise ConfigError(
            f"{'device_map has modules on' if result_on_disk else 'offload is'} 'disk', but the checkpoint's files are "
            f"{found}; weights can be read one by one from safetensors files only. Load the model and save it once "
            "with save_pretrained, or have everything on 'cpu' or an accelerator."
        )
    if wanted != "auto":
        return wanted
    size_bytes = sum(os.path.getsize(file) for file in files) if is_lazy else 0
    place = "disk" if size_bytes > RAM_SHARE * free_ram_bytes(recipe) else "cpu"
    if place == "disk":
        logger.info("The checkpoint has %.1f GiB; its weights stay on the disk.", size_bytes / 2**30)
    return place


def open_workplace(
    model: PreTrainedModel,
    recipe: AwqOffloadConfig,
    calibration: CalibrationSet | None,
    weights: StoredWeights | None,
    to_checkpoint: ToCheckpoint | None = None,
    files: Sequence[Path] | None = None,
    offload: OffloadFolder | None = None,
) -> Workplace:
    """Where `model` is quantized.

    Args:
        model: on the CPU; on the meta device where `weights` says where its weights are.
        recipe: device, prefetch, max_memory and checkpoint_dir are used.
        calibration: for the journal's fingerprint.
        weights: of a model on the meta device.
        to_checkpoint: streams, see `Workplace`.
        files: the source, for the journal's fingerprint; by default those of `weights`.
        offload: as in `Workplace`.

    Raises:
        JournalError: the journal in checkpoint_dir is of another run.
        ConfigError: a journal is asked for, but the model does not come from safetensors files.
    """
    journal = None
    if recipe.checkpoint_dir is not None:
        files = files or (weights.files if weights is not None else [])
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise ConfigError(
                f"checkpoint_dir is {os.fspath(recipe.checkpoint_dir)!r}, but the model does not come from safetensors "
                "files; a journal needs these to know the model again. Save it once with save_pretrained."
            )
        parts = fingerprint(model, recipe, calibration, files)
        journal = Journal(recipe.checkpoint_dir, parts | {"form": "in memory" if to_checkpoint is None else "streamed"})
        if journal.commits:
            logger.info("%d layers are in the journal %s.", len(journal.commits), journal.directory)
    onloader = Onloader(model, execution_device(recipe), weights, recipe.prefetch)
    spill_bytes = HIDDEN_SHARE * free_ram_bytes(recipe)
    return Workplace(onloader, journal, to_checkpoint, spill_bytes=spill_bytes, offload=offload)
