"""What a quantization run did: plain records, filled by the pipeline, read by whoever shows or saves them.

Records go through the journal as JSON. Fields with a default may be missing there: an earlier release wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GroupReport:
    """One input group of a decoder layer."""

    consumers: tuple[str, ...]  # linears of the group that were quantized, names within the layer
    producer: str | None  # what absorbed the scale; None: no fold was found, rounded without scales
    alpha: float | None  # exponent of the winning candidate; None: the identity
    loss_nearest: float  # mean squared output error per token, rounding to nearest
    loss: float  # the same as quantized
    unscaled: str | None = None  # why the identity was taken; None where there is a scale
    loss_scaled: float | None = None  # the same of rounding to nearest with the scale: what scales alone gain
    rows: int = 0  # output channels of the group's linears
    rows_nearest: int = 0  # those that neither clipping nor error feedback improved: rounded to nearest
    clip_counts: tuple[int, ...] = ()
    """How many groups of weights kept 1 - i/20 of their range, i = 0 … 9; empty where clipping was not searched."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes when a layer was finished, above what the process had in use when the run began."""

    ram: int  # resident set
    ram_peak: int  # its highest in the run so far, as far as the system tells
    accelerator: int = 0  # allocated on the execution device, 0 on a CPU
    accelerator_peak: int = 0


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer."""

    name: str
    groups: tuple[GroupReport, ...]
    seconds: float
    starved_experts: dict[str, int] = field(default_factory=dict)
    """Experts that saw fewer tokens than the config's `min_expert_tokens` -> how many."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Onload, structure, forward and search, over all runs of the layer."""
    memory: MemoryUse | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LayerReport:
        """The inverse of `dataclasses.asdict`, also by way of JSON."""
        groups = tuple(_group_from_dict(group) for group in fields["groups"])
        memory = fields.get("memory")
        return cls(**{**fields, "groups": groups, "memory": None if memory is None else MemoryUse(**memory)})

    @property
    def loss_nearest(self) -> float:
        return sum(group.loss_nearest for group in self.groups)

    @property
    def loss(self) -> float:
        return sum(group.loss for group in self.groups)


@dataclass
class QuantizationReport:
    """The whole run."""

    layers: list[LayerReport] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # linear -> why it stays in full precision
    tokens: int = 0  # calibration tokens that entered the statistics
    phase_seconds: dict[str, float] = field(default_factory=dict)  # where the time went, in this process


@dataclass(frozen=True)
class Plan:
    """What a quantization takes. Memory is what comes to that of the process before."""

    device: str
    layers: int
    tokens: int
    batch_tokens: int
    accelerator_peak_bytes: int  # 0 on a CPU
    ram_peak_bytes: int
    disk_bytes: int  # the new checkpoint, and the journal at its largest
    seconds: float | None  # None: not probed

    def __str__(self) -> str:
        parts = [f"{self.layers} layers on {self.device}, {self.tokens} tokens in micro-batches of {self.batch_tokens}"]
        if self.accelerator_peak_bytes:
            parts.append(f"accelerator {self.accelerator_peak_bytes / 2**30:.2f} GiB")
        parts += [f"RAM {self.ram_peak_bytes / 2**30:.2f} GiB", f"disk {self.disk_bytes / 2**30:.2f} GiB"]
        if self.seconds is not None:
            parts.append(f"{self.seconds / 60:.1f} minutes")
        return ", ".join(parts)


def _group_from_dict(fields: dict[str, Any]) -> GroupReport:
    tuples: dict[str, Any] = {name: tuple(fields[name]) for name in ("consumers", "clip_counts") if name in fields}
    return GroupReport(**{**fields, **tuples})
