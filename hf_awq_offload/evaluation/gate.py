"""Says whether a model is too far from its original, which decoder layers add most to it, and what would help.

The relative error e of the hidden states accumulates from layer to layer. What layer i adds is taken as the growth of
its square, max(0, e_i² - e_{i-1}²): independent errors add up in squares. A layer that is quantized in more bits adds
less, so the layers that add most are what `overrides` of the recipe should name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..reporting.evaluation import Evaluation, LayerError

MOST_NAMED = 4
ENOUGH_SHARE = 0.5
"""Layers are named until they add up to this share of the error."""
MORE_BITS = 8


@dataclass(frozen=True)
class Contribution:
    """What a decoder layer adds to the error of the hidden states."""

    name: str
    share: float  # of what all layers add


@dataclass(frozen=True)
class TooFar:
    """A model whose divergence from its original is above a bound."""

    kl_nats: float
    max_kl: float
    layers: tuple[Contribution, ...]  # those that add most, the largest first; empty where layers were not watched
    overrides: dict[str, dict[str, int]]  # of a recipe that would quantize these layers in more bits

    def __str__(self) -> str:
        text = f"KL to the original is {self.kl_nats:.5f} nats, above the bound of {self.max_kl:g}."
        if not self.layers:
            return f"{text} Evaluate with --streamed (streamed=True) to see which decoder layers add most to it."
        named = ", ".join(f"{layer.name} ({layer.share:.0%})" for layer in self.layers)
        return (
            f"{text} Most of the error comes from {named}. Quantize them in more bits: --overrides "
            f"'{json.dumps(self.overrides)}', or all layers with a smaller group size or more bits."
        )


def too_far(evaluation: Evaluation, max_kl: float | None) -> TooFar | None:
    """Returns what is wrong with a model whose KL is above `max_kl` or no number; None if it is not."""
    kl_nats = evaluation.kl_nats
    if max_kl is None or kl_nats is None or kl_nats <= max_kl:
        return None
    layers = largest_contributions(evaluation.layers)
    overrides = {f"{re.escape(layer.name)}\\.": {"bits": MORE_BITS} for layer in layers}
    return TooFar(kl_nats, max_kl, layers, overrides)


def largest_contributions(errors: Sequence[LayerError]) -> tuple[Contribution, ...]:
    """Returns the layers that add most to the error, until half of it or MOST_NAMED layers are named."""
    before, added = 0.0, {}
    for error in errors:
        after = error.relative_error**2
        added[error.name], before = max(0.0, after - before), after
    total, named, found = sum(added.values()), 0.0, []
    for name in sorted(added, key=added.__getitem__, reverse=True)[:MOST_NAMED]:
        if added[name] <= 0 or named >= ENOUGH_SHARE * total:
            break
        found.append(Contribution(name, added[name] / total))
        named += added[name]
    return tuple(found)
