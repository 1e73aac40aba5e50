"""Collects groups that play the same part in every layer and expert into families, the rows of charts and tables.

layers.7: ("mlp.experts.12.down_proj",)  ->  "mlp.experts.*.down_proj"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..formats.name_patterns import NUMBER
from ..report import GroupReport, LayerReport, QuantizationReport


@dataclass(frozen=True)
class Family:
    """Groups of one kind, from one layer (a single group, or one per expert) or from all layers."""

    groups: tuple[GroupReport, ...]

    @property
    def loss_nearest(self) -> float:
        return sum(group.loss_nearest for group in self.groups)

    @property
    def loss_scaled(self) -> float | None:
        """Sum over the groups; None if one of them has no such loss."""
        losses = [group.loss_scaled for group in self.groups if group.loss_scaled is not None]
        return sum(losses) if len(losses) == len(self.groups) else None

    @property
    def loss(self) -> float:
        return sum(group.loss for group in self.groups)

    @property
    def alphas(self) -> list[float]:
        """Exponents of the groups that have a scale, ascending."""
        return sorted(group.alpha for group in self.groups if group.alpha is not None)

    @property
    def reasons(self) -> dict[str, int]:
        """Maps each reason for having no scale to the number of groups it applies to."""
        counts: dict[str, int] = {}
        for group in self.groups:
            if group.alpha is None:
                reason = group.unscaled or "not recorded"
                counts[reason] = counts.get(reason, 0) + 1
        return counts

    @property
    def clip_counts(self) -> list[int]:
        """Number of weight groups per clipping ratio, see GroupReport; empty where clipping was not searched."""
        return [sum(counts) for counts in zip(*(g.clip_counts for g in self.groups if g.clip_counts), strict=True)]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def rows_nearest(self) -> int:
        return sum(group.rows_nearest for group in self.groups)


def family_name(consumers: Iterable[str]) -> str:
    """Returns the name that all groups of a kind share: "self_attn: q_proj, k_proj, v_proj"."""
    names = list(dict.fromkeys(NUMBER.sub("*", name) for name in consumers))
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return ", ".join(names)
    parent = parents.pop()
    lasts = ", ".join(name.rpartition(".")[2] for name in names)
    return f"{parent}: {lasts}" if parent else lasts


def families_of(layer: LayerReport) -> dict[str, Family]:
    """Returns the groups of one layer by family."""
    return _by_name(layer.groups)


def all_families(report: QuantizationReport) -> dict[str, Family]:
    """Returns the groups of all layers by family, in order of first appearance."""
    return _by_name(group for layer in report.layers for group in layer.groups)


def collapsed(names: Iterable[str]) -> dict[str, int]:
    """Replaces the numbers in names by "*"; maps each result to how many names it stands for."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = NUMBER.sub("*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return counts


def _by_name(groups: Iterable[GroupReport]) -> dict[str, Family]:
    families: dict[str, list[GroupReport]] = {}
    for group in groups:
        families.setdefault(family_name(group.consumers), []).append(group)
    return {name: Family(tuple(members)) for name, members in families.items()}


def has_experts(report: QuantizationReport) -> bool:
    """Returns whether a layer has linears that are numbered, as the experts of a mixture are."""
    return any("*" in name for layer in report.layers for name in families_of(layer))
