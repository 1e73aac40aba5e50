"""What every step of a run reads: the model, the recipe, and where things are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..config import AwqOffloadConfig
from ..model.linears import linears_in
from ..model.mtp_layer import MtpLayer
from ..offload.journal import LayerCommit
from .layer_context import LayerContext, Undo
from .memory_pressure import MemoryPressure
from .run_record import RunRecord
from .run_storage import RunStorage
from .stack_rounding import Rounder


@dataclass(frozen=True)
class Run:
    """One quantization of one model."""

    model: nn.Module
    recipe: AwqOffloadConfig
    storage: RunStorage
    record: RunRecord
    is_quantizable: Callable[[str], bool]
    """Full name of a linear -> whether to quantize it."""
    undo: Undo | None
    """Takes what brings the model back to what it was; None if nobody will ask for that."""
    most_layers: int | None
    """The run stops after so many layers."""
    rounder: Rounder
    """Rounds linears and makes the modules that replace them."""
    pressure: MemoryPressure
    """Repeats what ran out of memory."""
    mtp: MtpLayer | None = None
    """The layer for multi-token prediction that stands in the model."""

    @property
    def device(self) -> torch.device:
        """The execution device."""
        return self.storage.onloader.device

    def context(self, name: str) -> LayerContext:
        """Returns what the steps on one decoder layer share."""
        layer = self.model.get_submodule(name)
        quantizable = frozenset(part for part in linears_in(layer) if self.is_quantizable(f"{name}.{part}"))
        return LayerContext(
            name, layer, quantizable, self.recipe, self.undo, self.pressure.attempt, self.pressure.trim_cache
        )

    def adopt(self, commit: LayerCommit) -> None:
        """Reports a layer that an earlier run has quantized, and takes no more memory than it had left by then."""
        self.record.adopt(commit)
        self.pressure.adopt(commit.report.get("memory", {}))

    @contextmanager
    def onloaded(self, name: str) -> Iterator[nn.Module]:
        """Yields a decoder layer on the execution device; notes how long bringing it there took."""
        with ExitStack() as stack:
            with self.record.timed("onload", name):
                layer = stack.enter_context(self.storage.onloader.onloaded(name))
            yield layer
