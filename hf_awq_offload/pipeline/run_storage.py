"""Where a quantization has its layers, its results and its hidden states.

in memory   a finished layer stays in RAM, from where the model is returned, or goes to the caller's offload_folder
streamed    a finished layer is committed to the journal and released; the journal's files become the checkpoint
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.dataset import CalibrationSet
from ..config import AwqOffloadConfig
from ..errors import ConfigError, JournalError
from ..logs import get_logger
from ..machine_errors import first_line
from ..offload.devices import default_execution_device
from ..offload.hidden_states import HiddenWriter
from ..offload.hidden_storage import HiddenStorage
from ..offload.journal import Journal, LayerCommit
from ..offload.offload_folder import OffloadFolder
from ..offload.onloader import Onloader
from ..offload.stored_weights import StoredWeights
from ..report import LayerReport
from .fingerprint import fingerprint
from .layer_context import LayerContext
from .layer_quantization import restore_layer

logger = get_logger(__name__)

RAM_SHARE = 0.8
"""A checkpoint that takes more than this share of the free RAM stays on the disk."""
HIDDEN_SHARE = 0.25
"""Hidden states that take more than this share of the free RAM go to a file: a layer needs twice their size."""

ToCheckpoint = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Renames and converts tensors: by their names in the model -> as the checkpoint holds them."""


class RunStorage:
    """Stores the layers, results and hidden states of one run.

    Args:
        onloader: brings layers to the execution device.
        journal: keeps what is finished, for a later run; None forgets it.
        to_checkpoint: for a streamed run, converts a layer's tensors to those of the checkpoint, for the journal.
            None: the model stays in RAM.
        spill_bytes: hidden states of more bytes than this go to a file.
        offload: the folder for layers that stay on the disk in the model that is returned.
    """

    def __init__(
        self,
        onloader: Onloader,
        journal: Journal | None = None,
        to_checkpoint: ToCheckpoint | None = None,
        spill_bytes: float = float("inf"),
        offload: OffloadFolder | None = None,
    ):
        assert journal is not None or to_checkpoint is None
        self.onloader = onloader
        self.journal = journal
        self.hidden = HiddenStorage(journal, spill_bytes)
        self._to_checkpoint = to_checkpoint
        self._offload = offload

    @property
    def is_streamed(self) -> bool:
        """Whether finished layers are in the journal alone."""
        return self._to_checkpoint is not None

    @property
    def commits(self) -> Mapping[str, LayerCommit]:
        """Layers in the journal, by name."""
        return {} if self.journal is None else dict(self.journal.commits)

    def store_layer(
        self,
        index: int,
        report: LayerReport,
        left_out: dict[str, str],
        choices: str,  # what was chosen for the layer, see layer_choices.py
        memory: dict[str, Any],  # what the run had left, see `MemoryPressure.notes`
        batch_tokens: int = 0,  # of the micro-batches that the layer ran on
        hidden: HiddenWriter | None = None,  # what enters the next layer
    ) -> None:
        """Stores a layer that is onloaded and quantized where finished layers go.

        Raises:
            StorageError: the journal cannot be written; what it held before is whole.
        """
        name = report.name
        layer = self.onloader.model.get_submodule(name)
        if self.journal is not None:
            tensors = {f"{name}.{key}": value.detach().cpu() for key, value in layer.state_dict().items()}
            if self._to_checkpoint is not None:
                tensors = self._to_checkpoint(tensors)
            entry = {"layer": asdict(report), "left_out": left_out, "choices": choices, "memory": memory}
            self.journal.commit(index, name, tensors, batch_tokens, entry, hidden)
        if self._stays_on_disk(name):
            self._put_on_disk(
                name, {key: value.detach() for key, value in layer.named_parameters(remove_duplicate=False)}
            )
        if self._to_checkpoint is None and not self._stays_on_disk(name):
            self.onloader.keep(name)
        else:
            self.onloader.release(name)

    def settle(self) -> None:
        """Waits until every stored layer is durable.

        Raises:
            StorageError: the last one could not be made durable; what the journal held before is whole.
        """
        if self.journal is not None:
            self.journal.settle()

    def install(self, commits: Sequence[LayerCommit], context_of: Callable[[str], LayerContext]) -> None:
        """Puts layers that an earlier run has quantized into the model; their tensors only if it stays in RAM."""
        for commit in commits:
            context, report = context_of(commit.name), LayerReport.from_dict(commit.report["layer"])
            if self._to_checkpoint is not None:
                _restored(commit, context, report, None)
                continue
            state = {name.removeprefix(f"{commit.name}."): value for name, value in commit.tensors().items()}
            if self._stays_on_disk(commit.name):
                _restored(commit, context, report, None)
                self._put_on_disk(commit.name, state)
            else:
                _restored(commit, context, report, state)
                self.onloader.mark_in_ram(commit.name)

    def close(self) -> None:
        """Drops what was prefetched, deletes scratch files, and lets another run have the journal."""
        with ExitStack() as stack:  # each of them, whatever the others raise
            stack.callback(self.hidden.close)
            if self.journal is not None:
                stack.callback(self.journal.close)
            stack.callback(self.onloader.close)

    def _stays_on_disk(self, layer_name: str) -> bool:
        return self._offload is not None and self._offload.has(layer_name)

    def _put_on_disk(self, layer_name: str, tensors: Mapping[str, Tensor]) -> None:
        assert self._offload is not None
        self._offload.put(layer_name, {f"{layer_name}.{name}": value for name, value in tensors.items()})


def _restored(
    commit: LayerCommit, context: LayerContext, report: LayerReport, state: Mapping[str, Tensor] | None
) -> None:
    """Restores a layer; raises JournalError if what the journal says of it does not fit the model."""
    try:
        restore_layer(context, report, state)
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise JournalError(
            f"{commit.file} in the journal does not fit {commit.name}: {first_line(error)[:300]} It was "
            "changed after the run: remove this file to have the layer quantized again."
        ) from error


def execution_device(recipe: AwqOffloadConfig) -> torch.device:
    """Returns the device that decoder layers are processed on."""
    return default_execution_device() if recipe.execution_device is None else torch.device(recipe.execution_device)


def free_ram_bytes(recipe: AwqOffloadConfig) -> int:
    """Returns how much RAM may be used: what is free, but no more than `max_memory` says."""
    available = int(psutil.virtual_memory().available)
    limit = recipe.memory_limit_bytes(torch.device("cpu"))
    return available if limit is None else min(available, limit)


def chosen_offload(
    recipe: AwqOffloadConfig, files: Sequence[Path], result_on_disk: bool, dequantized_bytes: int | None = None
) -> str:
    """Returns "cpu" or "disk". Where the quantized model is to stay on the disk, so does the one in full precision.

    `dequantized_bytes` is the size in RAM of a checkpoint that is quantized; None: that of its files.

    Raises:
        ConfigError: the disk is asked for, but the checkpoint's files cannot be read lazily.
    """
    is_lazy = bool(files) and all(file.suffix == ".safetensors" for file in files)
    wanted = "disk" if result_on_disk else recipe.offload
    if wanted == "disk" and not is_lazy:
        names = ", ".join(file.name for file in files) or "none"
        raise ConfigError(
            f"{'device_map has modules on' if result_on_disk else 'offload is'} 'disk', but the checkpoint's files are "
            f"{names}; weights can be read one by one from safetensors files only. Load the model and save it once "
            "with save_pretrained, or have everything on 'cpu' or an accelerator."
        )
    if wanted != "auto":
        return wanted
    size_bytes = dequantized_bytes or (sum(file.stat().st_size for file in files) if is_lazy else 0)
    place = "disk" if size_bytes > RAM_SHARE * free_ram_bytes(recipe) else "cpu"
    if place == "disk":
        logger.info("The checkpoint has %.1f GiB; its weights stay on the disk.", size_bytes / 2**30)
    return place


def open_run_storage(
    model: PreTrainedModel,
    recipe: AwqOffloadConfig,
    calibration: CalibrationSet | None,
    weights: StoredWeights | None,
    to_checkpoint: ToCheckpoint | None = None,
    files: Sequence[Path] | None = None,
    offload: OffloadFolder | None = None,
    source_format: str | None = None,
    is_kept: bool = True,
) -> RunStorage:
    """Opens what a quantization of `model` needs: the onloader, and the journal if the recipe asks for one.

    Args:
        model: on the CPU, or on the meta device if `weights` is given.
        recipe: of it, execution_device, prefetch, max_memory and checkpoint_dir are used.
        calibration: for the journal's fingerprint.
        weights: the stored weights of a model on the meta device.
        to_checkpoint: of a streamed run, see `RunStorage`.
        files: of the source, for the journal's fingerprint; by default those of `weights`.
        offload: as in `RunStorage`.
        source_format: how the source is quantized, for the journal's fingerprint; None: it is in full precision.
        is_kept: the journal is for a later run; otherwise it only holds what is finished.

    Raises:
        JournalError: the journal in checkpoint_dir belongs to another run.
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
        parts = fingerprint(model, recipe, calibration, files, source_format)
        form = "in memory" if to_checkpoint is None else "streamed"
        journal = Journal(recipe.checkpoint_dir, parts | {"form": form}, is_kept)
        if journal.commits:
            logger.info("%d layers are in the journal %s.", len(journal.commits), journal.directory)
    onloader = Onloader(model, execution_device(recipe), weights, recipe.prefetch)
    spill_bytes = HIDDEN_SHARE * free_ram_bytes(recipe)
    return RunStorage(onloader, journal, to_checkpoint, spill_bytes, offload)
