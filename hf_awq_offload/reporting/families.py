"""Groups that do the same in their layers, over all layers and experts: what pictures and tables have a row for.

layers.7: ("mlp.experts.12.down_proj",)  ->  "mlp.experts.*.down_proj"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..formats.name_patterns import NUMBER
from ..report import GroupReport, LayerReport, QuantizationReport


@dataclass(frozen=True)
class Family:
    """Groups of one kind: of one layer (one, or one of each expert), or of all layers."""

    groups: tuple[GroupReport, ...]

    @property
    def loss_nearest(self) -> float:
        return sum(group.loss_nearest for group in self.groups)

    @property
    def loss_scaled(self) -> float | None:
        """None if one of them does not say."""
        losses = [group.loss_scaled for group in self.groups if group.loss_scaled is not None]
        return sum(losses) if len(losses) == len(self.groups) else None

    @property
    def loss(self) -> float:
        return sum(group.loss for group in self.groups)

    @property
    def alphas(self) -> list[float]:
        """Of those that have a scale, ascending."""
        return sorted(group.alpha for group in self.groups if group.alpha is not None)

    @property
    def reasons(self) -> dict[str, int]:
        """Why groups have no scale -> how many."""
        counts: dict[str, int] = {}
        for group in self.groups:
            if group.alpha is None:
                reason = group.unscaled or "not recorded"
                counts[reason] = counts.get(reason, 0) + 1
        return counts

    @property
    def clip_counts(self) -> list[int]:
        """Groups of weights by clipping range, see GroupReport; empty where clipping was not searched."""
        return [sum(counts) for counts in zip(*(g.clip_counts for g in self.groups if g.clip_counts), strict=True)]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def rows_nearest(self) -> int:
        return sum(group.rows_nearest for group in self.groups)


def family_name(consumers: Iterable[str]) -> str:
    """One name for all groups of a kind: "self_attn: q_proj, k_proj, v_proj"."""
    names = list(dict.fromkeys(NUMBER.sub("*", name) for name in consumers))
    parents = {name.rpartition(".")[0] for name in names}
    if len(names) == 1 or len(parents) > 1:
        return ", ".join(names)
    parent = parents.pop()
    lasts = ", ".join(name.rpartition(".")[2] for name in names)
    return f"{parent}: {lasts}" if parent else lasts


def families_of(layer: LayerReport) -> dict[str, Family]:
    """The groups of one layer by family."""
    return _by_name(layer.groups)


def all_families(report: QuantizationReport) -> dict[str, Family]:
    """Those of all layers, in the order in which they first come."""
    return _by_name(group for layer in report.layers for group in layer.groups)


def collapsed(names: Iterable[str]) -> dict[str, int]:
    """Names with their numbers taken out -> how many of them there are."""
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
