"""One decoder layer, from its statistics to packed weights: scales, folded, then clip, round, pack for every linear.

Everything numeric is a pure function of (weight, statistics) in `search/` and `formats/`; this file brings
these together on the modules of a layer and decides nothing about numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..calibration.layer_statistics import GatheredStatistics
from ..config import AwqOffloadConfig
from ..errors import NumericalError
from ..formats.grid import Grid, GroupParameters, GroupRange, group_parameters, group_range, quantize
from ..model.folds import InputGroup, LayerStructure, ProducerKind, absorb, storable_scale
from ..nn.registry import linear_class
from ..report import GroupReport, LayerReport
from ..search.clip import STEP, STEPS, search_clip
from ..search.rounding import FeedbackOrder, RoundedWeight, feedback_order, round_weight
from ..search.scale import ScaleSearch, search_scale, weights_mse, without_scale
from ..search.statistics import InputStatistics

STACK_ELEMENTS = 2**26
"""Weights of several linears that are rounded together: 256 MiB for each fp32 temporary."""

NO_PRODUCER = "no norm or linear was found that can absorb a scale of this input"
NO_BETTER = "no scale is better than none"
NOT_STORABLE = "no scale can be stored in the producer's dtype"
SEARCH_OFF = "the scale search is off (n_grid=0)"
NO_DATA = "quantized without calibration data"

Undo = list[Callable[[], None]]
"""What brings the model back to what it was, to be called in reverse order."""


@dataclass(frozen=True)
class LayerContext:
    """What the steps on one decoder layer share."""

    name: str
    layer: nn.Module
    quantizable: frozenset[str]  # names of linears, within the layer
    recipe: AwqOffloadConfig
    undo: Undo | None

    def grid(self, linear_name: str) -> Grid:
        linear = self.linear(linear_name)
        return self.recipe.grid(f"{self.name}.{linear_name}", linear.in_features, linear.weight.dtype)

    def quantizable_of(self, group: InputGroup) -> tuple[str, ...]:
        return tuple(name for name in group.consumers if name in self.quantizable)

    def linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.layer.get_submodule(name))


@dataclass(frozen=True)
class RoundingData:
    """What is known about the input of linears that are to be rounded."""

    gram: Tensor  # (in, in) fp32, of the scaled input
    order: FeedbackOrder | None  # None: to the nearest
    clippable: frozenset[str]
    nearest_mse: Mapping[str, Tensor]  # (out,) of rounding to the nearest on the full range; empty: not known


class StackOutcome(NamedTuple):
    """What rounding linears of one input and one grid gave, in the units of the layer as it was."""

    loss: float = 0.0  # squared output error per token, summed
    loss_scaled: float = 0.0  # the same of rounding to the nearest, scales applied
    rows: int = 0
    rows_nearest: int = 0
    clip_counts: Tensor | None = None  # (STEPS,) int64, see GroupReport; None: not searched


def quantize_with_statistics(
    context: LayerContext, structure: LayerStructure, statistics: GatheredStatistics
) -> list[GroupReport]:
    """Scales for every group, folded; then clip, round and pack every linear."""
    device = next(context.layer.parameters()).device  # statistics may be elsewhere, see pipeline/budget.py
    searched = [
        (group, group_statistics, _search_group_scale(context, group, group_statistics.to(device)))
        for group in structure.groups
        if (group_statistics := statistics.of_group(group)) is not None
    ]
    row_scales, channel_scales = _fold_scales(context, [(group, search) for group, _, search in searched])
    reports = []
    for group, group_statistics, search in searched:
        names = context.quantizable_of(group)
        nearest_mse = dict(
            zip(names, search.row_mse.split([context.linear(name).out_features for name in names]), strict=True)
        )
        outcomes = []
        loss_nearest = 0.0
        inputs = _by_input(names, statistics)
        for sharing in inputs:
            own = statistics.of_linear(group, sharing[0])
            here = own.to(device)
            loss_nearest += _identity_loss(context, sharing, here) if len(inputs) > 1 else search.identity_loss
            scale = channel_scales.get(sharing[0])
            gram = here.gram if scale is None else here.divided(scale).gram
            data = RoundingData(
                gram=gram,
                order=feedback_order(gram) if context.recipe.rounding == "error_feedback" else None,
                clippable=frozenset(sharing) - structure.softmax_only if context.recipe.clip else frozenset(),
                nearest_mse=nearest_mse if own is group_statistics else {},
            )
            for stack in _stacks(context, sharing):
                outcomes.append(quantize_stack(context, stack, scale, row_scales, data))
        reports.append(_group_report(context, group, search, loss_nearest, outcomes))
    return reports


def restore_layer(
    context: LayerContext,
    report: LayerReport,
    state: Mapping[str, Tensor] | None,  # by names within the layer; None leaves it on the meta device
) -> None:
    """Put a layer that was quantized before in the place of the one in full precision."""
    for name in (name for group in report.groups for name in group.consumers):
        linear = context.linear(name)
        bias, dtype = linear.bias is not None, linear.weight.dtype
        quantized = linear_class(context.recipe.checkpoint_format)(
            linear.in_features, linear.out_features, bias, context.grid(name), dtype, device="meta"
        )
        context.layer.set_submodule(name, quantized)
    if state is not None:
        context.layer.load_state_dict(dict(state), assign=True)


def quantize_without_data(context: LayerContext) -> list[GroupReport]:
    """Round every linear to nearest, each a group of its own; losses need data and are 0."""
    names = sorted(context.quantizable)
    outcomes = [quantize_stack(context, (name,), None, {}, None) for name in names]
    return [
        GroupReport((name,), None, None, 0.0, 0.0, NO_DATA, None, outcome.rows, outcome.rows)
        for name, outcome in zip(names, outcomes, strict=True)
    ]


def _identity_loss(context: LayerContext, names: list[str], statistics: InputStatistics) -> float:
    """Of rounding linears to the nearest, on the tokens that are theirs."""
    weights = [context.layer.get_parameter(f"{name}.weight").detach() for name in names]
    mse = weights_mse(weights, [context.grid(name) for name in names], statistics.gram)
    return float(mse.sum(dtype=torch.float64))


def _group_report(
    context: LayerContext,
    group: InputGroup,
    search: ScaleSearch,
    loss_nearest: float,
    outcomes: list[StackOutcome],
) -> GroupReport:
    clip_counts = [outcome.clip_counts for outcome in outcomes if outcome.clip_counts is not None]
    return GroupReport(
        consumers=context.quantizable_of(group),
        producer=group.fold.producer if group.fold is not None else None,
        alpha=search.alpha,
        loss_nearest=loss_nearest,
        loss=sum(outcome.loss for outcome in outcomes),
        unscaled=_why_unscaled(context, group, search),
        loss_scaled=sum(outcome.loss_scaled for outcome in outcomes),
        rows=sum(outcome.rows for outcome in outcomes),
        rows_nearest=sum(outcome.rows_nearest for outcome in outcomes),
        clip_counts=tuple(torch.stack(clip_counts).sum(dim=0).tolist()) if clip_counts else (),
    )


def _why_unscaled(context: LayerContext, group: InputGroup, search: ScaleSearch) -> str | None:
    if search.alpha is not None:
        return None
    if context.recipe.n_grid == 0:
        return SEARCH_OFF
    if group.fold is None:
        return group.refused or NO_PRODUCER
    return NO_BETTER if search.candidates else NOT_STORABLE


def _by_input(names: tuple[str, ...], statistics: GatheredStatistics) -> list[list[str]]:
    """The linears of a group that have the same statistics: experts have an input of their own each."""
    sharing: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sharing[statistics.leader_of[name]].append(name)
    return list(sharing.values())


def _stacks(context: LayerContext, names: list[str]) -> list[tuple[str, ...]]:
    """Linears of one input and grid whose rows are rounded together, as far as STACK_ELEMENTS goes."""
    stacks: list[tuple[str, ...]] = []
    for grid in dict.fromkeys(context.grid(name) for name in names):
        elements = STACK_ELEMENTS
        for name in [name for name in names if context.grid(name) == grid]:
            elements += context.linear(name).weight.numel()
            if elements > STACK_ELEMENTS:
                stacks.append(())
                elements = context.linear(name).weight.numel()
            stacks[-1] += (name,)
    return stacks


def _search_group_scale(context: LayerContext, group: InputGroup, statistics: InputStatistics) -> ScaleSearch:
    """The best scale of a group; the identity where nothing can absorb one or the search is off."""
    names = context.quantizable_of(group)
    weights = [context.layer.get_parameter(f"{name}.weight").detach() for name in names]
    grids = [context.grid(name) for name in names]
    if group.fold is None or context.recipe.n_grid == 0:
        return without_scale(weights, grids, statistics.gram, rows=weights[0].shape[1])
    return search_scale(
        weights,
        statistics,
        grids,
        n_grid=context.recipe.n_grid,
        duo_scaling=context.recipe.duo_scaling,
        row_of_channel=group.fold.row_of_channel,
        rows=group.fold.rows,
        with_feedback=context.recipe.rounding == "error_feedback",
        storable=partial(storable_scale, context.layer, group.fold),
    )


def _fold_scales(
    context: LayerContext, searched: list[tuple[InputGroup, ScaleSearch]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fold every winner into its producer; returns what is left to do in fp32 when linears are rounded.

    Returns (row scales, channel scales): per linear, what its output rows (out,) are still to be divided by, and per
    consumer what its input channels (in,) are still to be multiplied by. A producer that will be quantized is not
    touched here: its rows are divided in fp32 on the way to the grid, without a rounding in between.
    """
    row_scales: dict[str, Tensor] = {}
    channel_scales: dict[str, Tensor] = {}
    for group, search in searched:
        if group.fold is None or search.alpha is None:
            continue
        row_scale = search.row_scale
        if group.fold.kind is ProducerKind.ROWS and group.fold.producer in context.quantizable:
            # Two groups may divide different rows of one fused linear.
            row_scales[group.fold.producer] = row_scale * row_scales.get(group.fold.producer, 1.0)
        else:
            _remember(context, [f"{group.fold.producer}.weight", f"{group.fold.producer}.bias"])
            absorb(context.layer, group.fold, row_scale)
        scale = group.fold.channel_scale(row_scale)
        for name in group.consumers:
            if name in context.quantizable:
                channel_scales[name] = scale
            else:
                _remember(context, [f"{name}.weight"])
                context.layer.get_parameter(f"{name}.weight").data.mul_(scale)
        for reader in group.readers:
            _remember(context, [reader.parameter])
            parameter = context.layer.get_parameter(reader.parameter)
            parameter.data.mul_(reader.multiplier(scale, parameter.ndim))
    return row_scales, channel_scales


def quantize_stack(
    context: LayerContext,
    names: tuple[str, ...],  # linears of one input and one grid
    channel_scale: Tensor | None,  # (in,) multiplies the columns
    row_scales: Mapping[str, Tensor],  # name -> (out,) divides the rows
    data: RoundingData | None,  # None: to the nearest
) -> StackOutcome:
    """Round, pack and replace linears; errors are 0 without data."""
    grid = context.grid(names[0])
    weights = {name: _weight_on_grid(context, name, channel_scale, row_scales.get(name)) for name in names}
    if data is None:
        weight = torch.cat([*weights.values()])
        parameters = group_parameters(group_range(weight, grid), grid)
        codes = quantize(weight, parameters, grid)
        outcome = StackOutcome(rows=len(weight), rows_nearest=len(weight))
    else:
        # What a row is divided by, its consumer is multiplied by: errors count in the units of the layer as it was.
        units = {
            name: row_scales[name].square() if name in row_scales else torch.ones_like(weights[name][:, 0])
            for name in names
        }
        rounded = _round_stack(weights, grid, units, data)
        codes, parameters = rounded.codes, rounded.parameters
        outcome = _outcome(rounded, units, data.clippable)
    sizes = [len(weight) for weight in weights.values()]
    for name, *parts in zip(names, codes.split(sizes), *(each.split(sizes) for each in parameters), strict=True):
        _replace(context, name, parts[0], GroupParameters(*parts[1:]), row_scales.get(name))
    return outcome


def _outcome(rounded: RoundedWeight, units: Mapping[str, Tensor], clippable: frozenset[str]) -> StackOutcome:
    unit = torch.cat([*units.values()])
    loss, loss_scaled = (float((mse * unit).sum(dtype=torch.float64)) for mse in (rounded.mse, rounded.nearest_mse))
    counts = None
    if rounded.clip_ratio is not None:
        ratios = rounded.clip_ratio.split([len(each) for each in units.values()])
        searched = torch.cat([ratio for name, ratio in zip(units, ratios, strict=True) if name in clippable])
        counts = torch.bincount(((1 - searched) / STEP).round_().long().flatten(), minlength=STEPS).cpu()
    return StackOutcome(loss, loss_scaled, len(unit), len(unit) - int(rounded.improved.sum()), counts)


def _round_stack(
    weights: Mapping[str, Tensor],  # (out, in) fp32, scaled
    grid: Grid,
    units: Mapping[str, Tensor],  # (out,): what the squared error of a row is to be multiplied by
    data: RoundingData,
) -> RoundedWeight:
    clipped = nearest_mse = None
    if not data.clippable.isdisjoint(weights):
        ranges = [
            search_clip(weight, data.gram, grid) if name in data.clippable else group_range(weight, grid)
            for name, weight in weights.items()
        ]
        clipped = GroupRange(*map(torch.cat, zip(*ranges, strict=True)))
    if data.nearest_mse:
        nearest_mse = torch.cat([data.nearest_mse[name] / units[name] for name in weights])
    weight = torch.cat([*weights.values()])
    return round_weight(weight, data.gram, grid, clipped=clipped, order=data.order, nearest_mse=nearest_mse)


def _weight_on_grid(
    context: LayerContext,
    name: str,
    channel_scale: Tensor | None,  # (in,)
    row_scale: Tensor | None,  # (out,)
) -> Tensor:
    """The weight that is to be rounded, (out, in) fp32.

    Raises:
        NumericalError: the weight holds NaN or infinite values.
    """
    weight = context.linear(name).weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(
            f"The weight of {context.name}.{name} holds NaN or infinite values; expected finite ones. Repair the "
            "checkpoint, or name the module in modules_to_not_convert."
        )
    if channel_scale is not None:
        weight = weight * channel_scale
    return weight if row_scale is None else weight / row_scale.unsqueeze(1)


def _replace(
    context: LayerContext,
    name: str,
    codes: Tensor,  # (out, in)
    parameters: GroupParameters,  # (out, n)
    row_scale: Tensor | None,  # (out,) divides the bias
) -> None:
    linear = context.linear(name)
    bias = None if linear.bias is None else linear.bias.detach()
    if row_scale is not None and bias is not None:
        bias = (bias.float() / row_scale).to(bias.dtype)
    quantized = linear_class(context.recipe.checkpoint_format).from_codes(
        codes, parameters, bias, context.grid(name), linear.weight.dtype
    )
    context.layer.set_submodule(name, quantized)
    if context.undo is not None:
        linear.to("cpu")
        context.undo.append(partial(context.layer.set_submodule, name, linear))


def _remember(context: LayerContext, names: list[str]) -> None:
    """Let `undo` bring back these parameters, as far as the layer has them."""
    if context.undo is None:
        return
    for name, parameter in context.layer.named_parameters():
        if name in names:
            original = parameter.detach().to("cpu", copy=True)
            context.undo.append(partial(_set_data, parameter, original))


def _set_data(parameter: nn.Parameter, original: Tensor) -> None:
    parameter.data.copy_(original)
