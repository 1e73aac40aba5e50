"""Scales for the input groups of a decoder layer: searched on statistics, then folded into what produces the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.folds import InputGroup, ProducerKind, absorb, storable_scale
from ..search.scale import ScaleSearch, search_scale, without_scale
from ..search.statistics import InputStatistics
from .layer_context import LayerContext
from .weight_checks import scalable_magnitude

NO_PRODUCER = "no norm or linear was found that can absorb a scale of this input"
NO_BETTER = "no scale is better than none"
NOT_STORABLE = "no scale can be stored in the producer's dtype"
SEARCH_OFF = "the scale search is off (n_grid=0)"


class LinearScales(NamedTuple):
    """What a linear's weight is still to be scaled by, in fp32, on its way to the grid."""

    channels: Tensor | None = None  # (in,) multiplies the columns
    rows: Tensor | None = None  # (out,) divides the rows and the bias


UNSCALED = LinearScales()


def search_group_scale(context: LayerContext, group: InputGroup, statistics: InputStatistics) -> ScaleSearch:
    """Returns the best scale of a group; the identity if nothing can absorb one, or if the search is off."""
    names = context.quantizable_of(group)
    weights = [context.weight(name) for name in names]
    grids = [context.grid(name) for name in names]
    fold = group.fold
    if fold is None or context.recipe.n_grid == 0:
        return without_scale(weights, grids, statistics.gram, rows=weights[0].shape[1])
    magnitudes = [weight.abs().amax(dim=0).float() for weight in weights]  # (in,) each
    limits = [scalable_magnitude(grid, weight.dtype) for grid, weight in zip(grids, weights, strict=True)]

    def storable(row_scale: Tensor) -> Tensor | None:
        effective = storable_scale(context.layer, fold, row_scale)
        if effective is None:
            return None
        scale = fold.channel_scale(effective)
        fits = [(magnitude * scale).max() <= limit for magnitude, limit in zip(magnitudes, limits, strict=True)]
        return effective if bool(torch.stack(fits).all()) else None  # the host waits once, not for each linear

    return search_scale(
        weights,
        statistics,
        grids,
        n_grid=context.recipe.n_grid,
        duo_scaling=context.recipe.duo_scaling,
        row_of_channel=fold.row_of_channel,
        rows=fold.rows,
        with_feedback=context.recipe.rounding == "error_feedback",
        storable=storable,
    )


def why_unscaled(context: LayerContext, group: InputGroup, search: ScaleSearch) -> str | None:
    """Returns why a group has no scale; None if it has one."""
    if search.alpha is not None:
        return None
    if context.recipe.n_grid == 0:
        return SEARCH_OFF
    if group.fold is None:
        return group.refused or NO_PRODUCER
    return NO_BETTER if search.candidates else NOT_STORABLE


def fold_scales(context: LayerContext, searched: Sequence[tuple[InputGroup, ScaleSearch]]) -> dict[str, LinearScales]:
    """Folds every winning scale into its producer; returns what is left to do when the linears are rounded.

    A producer that will be quantized is not touched here: its rows are divided in fp32 on the way to the grid, without
    another rounding in between.
    """
    scales: dict[str, LinearScales] = {}
    for group, search in searched:
        if group.fold is None or search.alpha is None:
            continue
        producer, row_scale = group.fold.producer, search.row_scale
        if group.fold.kind is ProducerKind.ROWS and producer in context.quantizable:
            # Two groups may divide different rows of one fused linear.
            own = scales.get(producer, UNSCALED)
            scales[producer] = own._replace(rows=row_scale * (1.0 if own.rows is None else own.rows))
        else:
            context.remember([f"{producer}.weight", f"{producer}.bias"])
            absorb(context.layer, group.fold, row_scale)
        scale = group.fold.channel_scale(row_scale)
        for name in group.consumers:
            if name in context.quantizable:
                scales[name] = scales.get(name, UNSCALED)._replace(channels=scale)
            else:
                context.remember([f"{name}.weight"])
                context.layer.get_parameter(f"{name}.weight").data.mul_(scale)
        for reader in group.readers:
            context.remember([reader.parameter])
            parameter = context.layer.get_parameter(reader.parameter)
            parameter.data.mul_(reader.multiplier(scale, parameter.ndim))
    return scales
