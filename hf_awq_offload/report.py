"""What a quantization run did: plain records, filled by the pipeline, read by whoever shows or saves them."""

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


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer."""

    name: str
    groups: tuple[GroupReport, ...]
    seconds: float
    starved_experts: dict[str, int] = field(default_factory=dict)
    """Experts that saw fewer tokens than the config's `min_expert_tokens` -> how many."""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LayerReport:
        """The inverse of `dataclasses.asdict`, also by way of JSON."""
        groups = tuple(GroupReport(**{**group, "consumers": tuple(group["consumers"])}) for group in fields["groups"])
        return cls(**{**fields, "groups": groups})

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
