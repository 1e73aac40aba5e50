"""Scales for the input groups of a decoder layer: searched on statistics, then folded into what produces the inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.folds import InputGroup, ProducerKind, absorb, storable_scales
from ..search.chunks import ACCELERATOR_ELEMENTS, at_once
from ..search.scale import ScaleSearch, kept_elements, scale_steps, without_scale
from ..search.statistics import InputStatistics
from ..search.waiting import Reading, side_by_side
from ..transfers import sent
from .layer_context import LayerContext
from .weight_checks import scalable_magnitude

NO_PRODUCER = "no norm or linear was found that can absorb a scale of this input"
NO_BETTER = "unscaled was best"
NOT_STORABLE = "no scale can be stored in the producer's dtype"
SEARCH_OFF = "the scale search is off (n_grid=0)"


class LinearScales(NamedTuple):
    """What a linear's weight is still to be scaled by, in fp32, on its way to the grid."""

    channels: Tensor | None = None  # (in,) multiplies the columns
    rows: Tensor | None = None  # (out,) divides the rows and the bias


UNSCALED = LinearScales()


def search_group_scales(
    context: LayerContext,
    groups: Sequence[tuple[InputGroup, InputStatistics]],
    device: torch.device,  # of the layer
) -> list[ScaleSearch]:
    """Returns the best scale of each group. As many are searched side by side as fit: the host waits for all together.

    Statistics that are on another device than the layer come to it one after another.
    """
    results: list[ScaleSearch] = []
    batch: list[Reading[ScaleSearch]] = []
    elements = 0
    for group, statistics in groups:
        more = kept_elements(statistics.gram.shape[0])
        is_alone = device.type == "cpu" or statistics.gram.device != device  # a CPU has nothing to wait for
        if batch and (is_alone or elements + more > at_once(ACCELERATOR_ELEMENTS)):
            results += side_by_side(batch, context.between_steps)
            batch, elements = [], 0
        batch.append(search_group_scale(context, group, statistics.to(device)))
        elements += more
    return results + side_by_side(batch, context.between_steps)


def search_group_scale(context: LayerContext, group: InputGroup, statistics: InputStatistics) -> Reading[ScaleSearch]:
    """Finds the best scale of a group; the identity if nothing can absorb one, or if the search is off."""
    names = context.quantizable_of(group)
    weights = [context.weight(name) for name in names]
    grids = [context.grid(name) for name in names]
    fold = group.fold
    if fold is None or context.recipe.n_grid == 0:
        return without_scale(weights, grids, statistics.gram, rows=weights[0].shape[1])
    row_of_channel = sent(fold.row_of_channel, statistics.gram.device)
    magnitudes: dict[float, list[Tensor]] = defaultdict(list)  # (in,) each, by the largest that a scale may make of one
    for weight, grid in zip(weights, grids, strict=True):
        magnitudes[scalable_magnitude(grid, weight.dtype)].append(weight.abs().amax(dim=0).float())

    def storable(row_scales: Tensor) -> tuple[Tensor, Tensor]:
        effective, usable = storable_scales(context.layer, fold, row_scales)
        scales = effective.index_select(1, row_of_channel)
        for limit, of_weights in magnitudes.items():
            usable &= (torch.stack(of_weights).amax(dim=0) * scales).amax(dim=1) <= limit
        return effective, usable

    return scale_steps(
        weights,
        statistics,
        grids,
        n_grid=context.recipe.n_grid,
        duo_scaling=context.recipe.duo_scaling,
        row_of_channel=row_of_channel,
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
        if group.fold is None or search.channel_scale is None:
            continue
        producer, row_scale = group.fold.producer, search.row_scale
        if group.fold.kind is ProducerKind.ROWS and producer in context.quantizable:
            # Two groups may divide different rows of one fused linear.
            own = scales.get(producer, UNSCALED)
            scales[producer] = own._replace(rows=row_scale * (1.0 if own.rows is None else own.rows))
        else:
            context.remember([f"{producer}.weight", f"{producer}.bias"])
            absorb(context.layer, group.fold, row_scale)
        scale = search.channel_scale
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
