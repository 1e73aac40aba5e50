"""Linears of one input and one grid, rounded together: their rows are stacked, and every step runs once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..formats.grid import Grid, GroupParameters, GroupRange, group_parameters, group_range, quantize
from ..nn.registry import linear_class
from ..search.chunks import at_once
from ..search.clip import STEP, STEPS, search_clip
from ..search.rounding import FeedbackOrder, RoundedWeight, round_weight
from .layer_context import LayerContext
from .scaling import UNSCALED, LinearScales
from .weight_checks import require_finite_result

STACK_ELEMENTS = 2**26
"""Weights of several linears that are rounded together: 256 MiB for each fp32 temporary."""


@dataclass(frozen=True)
class RoundingData:
    """What is known about the input of linears that are to be rounded."""

    gram: Tensor  # (in, in) fp32, of the scaled input
    order: FeedbackOrder | None  # None: to nearest
    clippable: frozenset[str]
    nearest_mse: Mapping[str, Tensor]  # linear -> (out,), of rounding to nearest on the full range; empty: not known


class StackOutcome(NamedTuple):
    """What rounding a stack gave, in the units of the layer as it was."""

    loss: float = 0.0  # squared output error per token, summed
    loss_scaled: float = 0.0  # the same of rounding to nearest, scales applied
    rows: int = 0
    rows_nearest: int = 0
    clip_counts: Tensor | None = None  # (STEPS,) int64, see GroupReport; None: not searched


class ScaledLinear(NamedTuple):
    """A linear on its way to the grid."""

    name: str
    weight: Tensor  # (out, in) fp32, scaled
    bias: Tensor | None  # (out,) in its own dtype, scaled
    unit: Tensor
    """(out,): what the squared error of a row is multiplied by to count in the units of the layer as it was. What a
    row is divided by, its consumer is multiplied by."""


Stack = Sequence[ScaledLinear]
"""Linears of one input and one grid."""

Rounder = Callable[[LayerContext, Stack, RoundingData], tuple[list[nn.Linear], StackOutcome]]
"""Rounds a stack on calibration data; returns the linears that take the places of those in the stack."""


def stacks(context: LayerContext, names: Sequence[str]) -> list[list[str]]:
    """Splits linears of one input into stacks of one grid each, and of as many weights as may be rounded at once."""
    split: list[list[str]] = []
    most_elements = at_once(STACK_ELEMENTS)
    for grid in dict.fromkeys(context.grid(name) for name in names):
        elements = most_elements
        for name in [name for name in names if context.grid(name) == grid]:
            elements += context.linear(name).weight.numel()
            if elements > most_elements:
                split.append([])
                elements = context.linear(name).weight.numel()
            split[-1].append(name)
    return split


def scaled_linear(context: LayerContext, name: str, scales: LinearScales = UNSCALED) -> ScaledLinear:
    """Returns a linear with its scales applied."""
    linear = context.linear(name)
    weight = linear.weight.detach().float()
    bias = None if linear.bias is None else linear.bias.detach()
    if scales.channels is not None:
        weight = weight * scales.channels
    if scales.rows is None:
        return ScaledLinear(name, weight, bias, torch.ones_like(weight[:, 0]))
    if bias is not None:
        bias = (bias.float() / scales.rows).to(bias.dtype)
    return ScaledLinear(name, weight / scales.rows.unsqueeze(1), bias, scales.rows.square())


def round_and_pack(context: LayerContext, stack: Stack, data: RoundingData) -> tuple[list[nn.Linear], StackOutcome]:
    """Rounds a stack with the clip search and error feedback that `data` asks for, and packs it. See `Rounder`."""
    grid = context.grid(stack[0].name)
    rounded = _round(stack, grid, data)
    return _packed(context, stack, grid, rounded.codes, rounded.parameters), _outcome(stack, rounded, data.clippable)


def round_to_nearest_and_pack(context: LayerContext, stack: Stack) -> tuple[list[nn.Linear], StackOutcome]:
    """Rounds a stack to nearest, without data: losses are 0."""
    grid = context.grid(stack[0].name)
    weight = torch.cat([linear.weight for linear in stack])
    parameters = group_parameters(group_range(weight, grid), grid)
    codes = quantize(weight, parameters, grid)
    outcome = StackOutcome(rows=len(weight), rows_nearest=len(weight))
    return _packed(context, stack, grid, codes, parameters), outcome


def _round(stack: Stack, grid: Grid, data: RoundingData) -> RoundedWeight:
    clipped = nearest_mse = None
    if any(linear.name in data.clippable for linear in stack):
        ranges = [
            search_clip(linear.weight, data.gram, grid)
            if linear.name in data.clippable
            else group_range(linear.weight, grid)
            for linear in stack
        ]
        clipped = GroupRange(*map(torch.cat, zip(*ranges, strict=True)))
    if data.nearest_mse:
        nearest_mse = torch.cat([data.nearest_mse[linear.name] / linear.unit for linear in stack])
    weight = torch.cat([linear.weight for linear in stack])
    return round_weight(weight, data.gram, grid, clipped=clipped, order=data.order, nearest_mse=nearest_mse)


def _outcome(stack: Stack, rounded: RoundedWeight, clippable: frozenset[str]) -> StackOutcome:
    unit = torch.cat([linear.unit for linear in stack])
    loss, loss_scaled = (float((mse * unit).sum(dtype=torch.float64)) for mse in (rounded.mse, rounded.nearest_mse))
    counts = None
    if rounded.clip_ratio is not None:
        ratios = rounded.clip_ratio.split(_rows(stack))
        searched = torch.cat([ratio for linear, ratio in zip(stack, ratios, strict=True) if linear.name in clippable])
        counts = torch.bincount(((1 - searched) / STEP).round_().long().flatten(), minlength=STEPS).cpu()
    return StackOutcome(loss, loss_scaled, len(unit), len(unit) - int(rounded.improved.sum()), counts)


def _packed(
    context: LayerContext,
    stack: Stack,
    grid: Grid,
    codes: Tensor,  # (rows of all linears, in)
    parameters: GroupParameters,  # (rows of all linears, n)
) -> list[nn.Linear]:
    rows = _rows(stack)
    linear_type = linear_class(context.recipe.checkpoint_format)
    parts = zip(stack, codes.split(rows), *(tensor.split(rows) for tensor in parameters), strict=True)
    packed: list[nn.Linear] = []
    for linear, own_codes, *own in parts:
        own_parameters, dtype = GroupParameters(*own), context.linear(linear.name).weight.dtype
        require_finite_result(context, linear.name, own_codes, own_parameters, grid)
        packed.append(linear_type.from_codes(own_codes, own_parameters, linear.bias, grid, dtype))
    return packed


def _rows(stack: Stack) -> list[int]:
    return [len(linear.weight) for linear in stack]
