"""One decoder layer, from its statistics to packed weights: scales, folded, then clip, round, pack for every linear.

Everything numeric is a pure function of (weight, statistics) in `search/`, `grid.py` and `packing.py`; this file brings
these together on the modules of a layer and decides nothing about numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .config import AwqOffloadConfig
from .errors import NumericalError
from .folds import InputGroup, LayerStructure, ProducerKind, absorb, storable_scale
from .gathering import GatheredStatistics
from .grid import Grid, group_parameters, group_range, quantize
from .linear_classes import linear_class
from .report import GroupReport, LayerReport
from .search.clip import search_clip
from .search.rounding import FeedbackOrder, feedback_order, round_weight
from .search.scale import ScaleSearch, output_mse, search_scale
from .statistics import InputStatistics

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

    def linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.layer.get_submodule(name))


def quantize_with_statistics(
    context: LayerContext, structure: LayerStructure, statistics: GatheredStatistics
) -> list[GroupReport]:
    """Scales for every group, folded; then clip, round and pack every linear."""
    searched = [
        (group, _search_group_scale(context, group, group_statistics))
        for group in structure.groups
        if (group_statistics := statistics.of_group(group)) is not None
    ]
    row_scales, channel_scales = _fold_scales(context, searched)
    reports = []
    for group, search in searched:
        quantized = tuple(name for name in group.consumers if name in context.quantizable)
        grams: dict[str, tuple[Tensor, FeedbackOrder | None]] = {}  # by whose input it is: experts have their own
        loss = 0.0
        for name in quantized:
            scale = channel_scales.get(name)
            leader = statistics.leader_of[name]
            if leader not in grams:
                own = statistics.of_linear(group, name)
                gram = own.gram if scale is None else own.divided(scale).gram
                grams[leader] = gram, feedback_order(gram) if context.recipe.rounding == "error_feedback" else None
            clip = context.recipe.clip and name not in structure.softmax_only
            loss += quantize_linear(
                context, name, scale, row_scales.get(name), grams[leader][0], clip, grams[leader][1]
            )
        producer = group.fold.producer if group.fold is not None else None
        reports.append(GroupReport(quantized, producer, search.alpha, search.identity_loss, loss))
    return reports


def _search_group_scale(context: LayerContext, group: InputGroup, statistics: InputStatistics) -> ScaleSearch:
    """The best scale of a group; the identity where nothing can absorb one or the search is off."""
    names = [name for name in group.consumers if name in context.quantizable]
    weights = [context.layer.get_parameter(f"{name}.weight").detach() for name in names]
    grids = [context.grid(name) for name in names]
    if group.fold is None or context.recipe.n_grid == 0:
        identity = torch.ones(weights[0].shape[1], device=statistics.gram.device)
        loss = output_mse(weights, statistics.gram, grids, identity)
        return ScaleSearch(identity, None, loss, loss)
    return search_scale(
        weights,
        statistics,
        grids,
        n_grid=context.recipe.n_grid,
        duo_scaling=context.recipe.duo_scaling,
        row_of_channel=group.fold.row_of_channel,
        rows=group.fold.rows,
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
            shape = [1] * parameter.ndim
            shape[reader.axis] = -1
            parameter.data.mul_(scale.view(shape))
    return row_scales, channel_scales


def quantize_linear(
    context: LayerContext,
    name: str,
    channel_scale: Tensor | None,  # (in,) multiplies the columns
    row_scale: Tensor | None,  # (out,) divides the rows
    gram: Tensor | None,  # (in, in) fp32, of the scaled input; None without data
    clip: bool = False,
    order: FeedbackOrder | None = None,  # None rounds to the nearest
) -> float:
    """Round, pack and replace one linear; returns its mean squared output error per token, 0 without data."""
    linear = context.linear(name)
    grid = context.grid(name)
    weight = linear.weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(
            f"The weight of {context.name}.{name} holds NaN or infinite values; expected finite ones. Repair the "
            "checkpoint, or name the module in modules_to_not_convert."
        )
    bias = None if linear.bias is None else linear.bias.detach()
    if channel_scale is not None:
        weight = weight * channel_scale
    if row_scale is not None:
        weight = weight / row_scale.unsqueeze(1)
        bias = None if bias is None else (bias.float() / row_scale).to(bias.dtype)
    ranges = search_clip(weight, gram, grid) if clip and gram is not None else group_range(weight, grid)
    parameters = group_parameters(ranges, grid)
    if gram is None:
        codes, loss = quantize(weight, parameters, grid), 0.0
    else:
        codes, mse = round_weight(weight, gram, parameters, grid, order)
        if row_scale is not None:
            mse = mse * row_scale.square()  # in the units of the layer as it was
        loss = float(mse.sum(dtype=torch.float64))
    quantized = linear_class(context.recipe.checkpoint_format).from_codes(
        codes, parameters, bias, grid, linear.weight.dtype
    )
    context.layer.set_submodule(name, quantized)
    if context.undo is not None:
        linear.to("cpu")
        context.undo.append(partial(context.layer.set_submodule, name, linear))
    return loss


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
    for name in sorted(context.quantizable):
        quantize_linear(context, name, None, None, None)
    return [GroupReport((name,), None, None, 0.0, 0.0) for name in sorted(context.quantizable)]


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
