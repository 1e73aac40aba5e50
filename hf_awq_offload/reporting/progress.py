"""Shows a run's progress: a bar on a terminal and in a notebook, a line per layer in a log file.

    terminal, notebook   Quantizing:  38%|███▊      | 12/32 [03:10, ETA 05:17, model.layers.12 search, loss …, peak …]
    anything else        [12/32] model.layers.11: loss 0.012 → 0.0045, onload 0.2 s, forward 1.1 s, … ETA 05:17

The bar is transformers' own (tqdm, with widgets in Jupyter). Nothing is shown after transformers'
`logging.disable_progress_bar()`, or at verbosity "error" and above.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from ..logs import can_redraw
from ..messages import size_text
from ..report import LayerReport, MemoryUse

LEAST_BAR = 6
"""Columns of the bar itself; what does not fit beside it is left out."""

BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def announce(text: str) -> None:
    """Prints a message about the run as a whole to stderr, if progress is shown at all."""
    if is_shown():
        print(text, file=sys.stderr, flush=True)


def is_shown() -> bool:
    return logging.is_progress_bar_enabled() and logging.get_verbosity() < logging.ERROR


class Progress:
    """Shows the progress of one run over the decoder layers. Use as a context manager.

    Args:
        title: shown in front of the bar.
    """

    def __init__(self, title: str = "Quantizing"):
        self.title = title
        self.total = 0
        self.done = 0
        self._bar: Any = None
        self._is_plain = False
        self._layer_seconds: list[float] = []
        self._since = time.perf_counter()
        self._last: list[str] = []
        """Loss and peak memory of the last finished layer."""

    def __enter__(self) -> Progress:
        if is_shown():
            self._is_plain = not can_redraw()
            if not self._is_plain:
                self._bar = logging.tqdm(
                    total=0, desc=self.title, unit="layer", bar_format=BAR_FORMAT, dynamic_ncols=True
                )
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, layers: int) -> None:
        """Sets the number of layers; call it just before the first begins."""
        self.total = layers
        self._since = time.perf_counter()
        if self._bar is not None:
            self._bar.reset(total=layers)

    def phase(self, name: str, layer: str | None = None) -> None:
        """Shows the current phase and the layer that it works on."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(layer, name))

    def finished(self, report: LayerReport) -> None:
        """Reports a layer that this run has quantized."""
        now = time.perf_counter()
        self._layer_seconds.append(now - self._since)
        losses = [f"loss {report.loss_nearest:.3g} → {report.loss:.3g}"] if report.loss_nearest > 0 else []
        peak = [] if report.memory is None else [f"peak {size_text(_peak_bytes(report.memory))}"]
        phases = [f"{phase} {seconds:.1f} s" for phase, seconds in report.phase_seconds.items()]
        self._last = losses + peak
        self._advance(report.name, [*losses, *phases, f"{now - self._since:.1f} s in all", *peak])

    def passed(self, name: str, facts: list[str]) -> None:
        """Reports a layer that text has been sent through; `facts` are shown beside its name."""
        self._layer_seconds.append(time.perf_counter() - self._since)
        self._last = facts
        self._advance(name, facts)

    def adopted(self, name: str) -> None:
        """Reports a layer that was found in the journal."""
        self._advance(name, ["quantized by an earlier run"])

    def _advance(self, name: str, facts: list[str]) -> None:
        self.done += 1
        self._since = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(name), refresh=False)
            self._bar.update()
        elif self._is_plain:
            said = ", ".join([*facts, *self._eta()])
            announce(f"[{self.done}/{self.total}] {name}" + (f": {said}" if said else ""))

    def _postfix(self, layer: str | None, phase: str = "") -> str:
        """Returns what stands after the bar: as much of it, most important first, as leaves LEAST_BAR for the bar."""
        short = None if layer is None else ".".join(layer.split(".")[-2:])
        doing, short_doing = (" ".join(filter(None, (name, phase))) for name in (layer, short))
        facts = [*self._eta(), short_doing, *self._last]
        room = self._room()
        for shown in ([*self._eta(), doing, *self._last], *(facts[:count] for count in range(len(facts), 0, -1))):
            if len(", ".join(shown)) <= room:
                return ", ".join(shown)
        return ""

    def _room(self) -> float:
        """Returns the columns that are left for what stands after the bar."""
        columns = self._bar.format_dict.get("ncols")
        if not isinstance(columns, int):  # a notebook
            return math.inf
        return columns - LEAST_BAR - len(f"{self.title}: 100%|| {self.total}/{self.total} [0:00:00, ]")

    def _eta(self) -> list[str]:
        """Estimates from this run's layers; the first is probed as well, so it counts only until a second is done."""
        known = self._layer_seconds[1:] or self._layer_seconds
        if not known or self.done >= self.total:
            return []
        return [f"ETA {tqdm.format_interval((self.total - self.done) * sum(known) / len(known))}"]


def _peak_bytes(memory: MemoryUse) -> int:
    """Returns the peak on the accelerator if there is one, else in RAM."""
    return memory.accelerator_peak or memory.ram_peak
