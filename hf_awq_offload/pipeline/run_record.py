"""What a run notes while it works: its report, its progress, and how long each phase took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..logs import get_logger
from ..messages import shortened
from ..offload.journal import LayerCommit
from ..offload.memory_use import MemoryWatch
from ..report import GroupReport, LayerReport, QuantizationReport
from ..reporting.progress import Progress

logger = get_logger(__name__)

MOST_GROUPS_TOLD = 8
"""The log names this many groups of a layer; a mixture of experts has hundreds, which the report has."""


class RunRecord:
    """Fills the report of one run and shows its progress.

    Args:
        title: what the run does, for the progress bar.
        device: the execution device, whose memory is watched.
        tokens: calibration tokens that enter the statistics.
    """

    def __init__(self, title: str, device: torch.device, tokens: int):
        self.report = QuantizationReport(tokens=tokens)
        self.progress = Progress(title)
        self.phase = "start"
        """The phase that the run is in, or was in last."""
        self._layer: str | None = None
        self._memory = MemoryWatch(device)
        self._layer_seconds: dict[str, dict[str, float]] = defaultdict(dict)
        """Layer -> phase -> seconds."""

    @property
    def finished_layers(self) -> int:
        return len(self.report.layers)

    @property
    def where(self) -> str:
        """The phase and the layer, for errors."""
        if self.phase == "start":
            return "the start"
        return f"the phase {self.phase!r}" + (f" of layer {self._layer}" if self._layer is not None else "")

    @contextmanager
    def timed(self, phase: str, layer: str | None = None) -> Iterator[None]:
        """Shows the phase while it lasts, and adds its seconds to those of the run and of the layer."""
        self.progress.phase(phase, layer)
        self.phase, self._layer = phase, layer
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        for sums in (self.report.phase_seconds, self._layer_seconds[layer] if layer is not None else {}):
            sums[phase] = sums.get(phase, 0.0) + seconds

    def layer_report(
        self, name: str, groups: Sequence[GroupReport], seconds: float, starved: dict[str, int] | None = None
    ) -> LayerReport:
        """Returns the report of a layer that has just been quantized; `seconds` is how long that took."""
        phases = dict(self._layer_seconds[name])
        return LayerReport(name, tuple(groups), seconds, starved or {}, phases, self._memory.now())

    def add(self, layer: LayerReport, left_out: dict[str, str]) -> None:
        """Adds a layer to the report; `left_out` says which of its linears stay in full precision, and why."""
        self.report.layers.append(layer)
        groups = [_told(group) for group in layer.groups]
        logger.info("%s: %s.", layer.name, shortened(groups, MOST_GROUPS_TOLD, between="; "))
        self.add_left_out(left_out)

    def add_left_out(self, left_out: dict[str, str]) -> None:
        """Adds linears that stay in full precision -> why."""
        self.report.left_out.update(left_out)

    def adopt(self, commit: LayerCommit) -> None:
        """Adds a layer that an earlier run has quantized."""
        self.add(LayerReport.from_dict(commit.report["layer"]), commit.report["left_out"])
        self.progress.adopted(commit.name)


def _told(group: GroupReport) -> str:
    """Returns what became of a group: its scale, or why it has none, and its loss."""
    scale = f"unscaled ({group.unscaled})" if group.alpha is None else f"α {group.alpha:.2f} into {group.producer}"
    loss = f", loss {group.loss / group.loss_nearest:.3f} × nearest" if group.loss_nearest > 0 else ""
    return f"{', '.join(group.consumers)}: {scale}{loss}"
