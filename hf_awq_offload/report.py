"""Records of what a quantization run did: the pipeline fills them, reports and the model card read them.

The journal stores records as JSON. Fields with a default may be missing there, in journals of earlier releases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .messages import size_text

FEW_TOKENS = "measured on fewer tokens than channels: not a measure of quality"


@dataclass(frozen=True)
class GroupReport:
    """One input group of a decoder layer."""

    consumers: tuple[str, ...]  # the group's quantized linears, by name within the layer
    producer: str | None  # module that absorbed the scale; None: no fold was found, so there is no scale
    alpha: float | None  # exponent of the best candidate; None: the identity
    loss_nearest: float  # mean squared output error per token when rounded to nearest
    loss: float  # mean squared output error per token as quantized
    unscaled: str | None = None  # why the group has no scale; None if it has one
    loss_scaled: float | None = None  # loss when scaled and rounded to nearest: what the scale alone gains
    rows: int = 0  # output channels of the group's linears
    rows_nearest: int = 0  # rows rounded to nearest, since neither clipping nor error feedback improved them
    clip_counts: tuple[int, ...] = ()
    """Number of weight groups that kept 1 - i/20 of their range, i = 0 … 9; empty where clipping was not searched."""
    tokens: int | None = None  # fewest calibration tokens behind the statistics of one of its linears; None: no data
    channels: int | None = None  # input channels; None in journals of earlier releases

    @property
    def has_few_tokens(self) -> bool:
        """Whether its losses were measured on fewer tokens than input channels, and so are no measure of quality."""
        return self.tokens is not None and self.channels is not None and self.tokens < self.channels


@dataclass(frozen=True)
class MemoryUse:
    """Bytes in use when a layer was finished, beyond what the process used when the run began."""

    ram: int  # resident set
    ram_peak: int  # highest resident set of the run so far, as far as the system reports it
    accelerator: int = 0  # allocated on the execution device; 0 on a CPU
    accelerator_peak: int = 0


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer."""

    name: str
    groups: tuple[GroupReport, ...]
    seconds: float
    starved_experts: dict[str, int] = field(default_factory=dict)
    """Maps experts that saw fewer tokens than the config's `min_expert_tokens` to the tokens that they saw."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in the phases onload, structure, forward and search, summed over retries of the layer."""
    memory: MemoryUse | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LayerReport:
        """Inverts `dataclasses.asdict`, also after a round trip through JSON."""
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
    tensor_parallel: str | None = None  # over how many devices servers can't split the model; None: 2, 4 and 8 are fine

    @property
    def loss_caveat(self) -> str | None:
        """What to say beside every loss of the run; None if all were measured on enough tokens."""
        groups = [group for layer in self.layers for group in layer.groups if group.tokens is not None]
        few = sum(group.has_few_tokens for group in groups)
        if not few:
            return None
        return FEW_TOKENS if few == len(groups) else f"{few} of {len(groups)} groups {FEW_TOKENS}"


@dataclass(frozen=True)
class Plan:
    """What a quantization needs. Memory is counted beyond what the process used before."""

    device: str
    layers: int
    tokens: int
    batch_tokens: int
    accelerator_peak_bytes: int  # 0 on a CPU
    ram_peak_bytes: int
    disk_bytes: int  # the new checkpoint plus the journal at its largest
    seconds: float | None  # None: not probed

    def __str__(self) -> str:
        parts = [f"{self.layers} layers on {self.device}, {self.tokens} tokens in micro-batches of {self.batch_tokens}"]
        if self.accelerator_peak_bytes:
            parts.append(f"accelerator {size_text(self.accelerator_peak_bytes)}")
        parts += [f"RAM {size_text(self.ram_peak_bytes)}", f"disk {size_text(self.disk_bytes)}"]
        if self.seconds is not None:
            parts.append(f"{self.seconds / 60:.1f} minutes")
        return ", ".join(parts)


def _group_from_dict(fields: dict[str, Any]) -> GroupReport:
    tuples: dict[str, Any] = {name: tuple(fields[name]) for name in ("consumers", "clip_counts") if name in fields}
    return GroupReport(**{**fields, **tuples})
