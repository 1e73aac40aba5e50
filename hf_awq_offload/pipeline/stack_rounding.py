"""Linears of one input and one grid, rounded together: their rows are stacked, and every step runs once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..formats.grid import Grid, GroupParameters, GroupRange, group_parameters, group_range, quantize
from ..nn.registry import linear_class
from ..search.chunks import STACK_ELEMENTS, at_once
from ..search.clip import STEP, STEPS, search_clip
from ..search.gram_matrix import Gram
from ..search.rounding import FeedbackOrder, RoundedWeight, round_weight
from .layer_context import LayerContext
from .scaling import UNSCALED, LinearScales
from .weight_checks import require_finite_result


@dataclass(frozen=True)
class RoundingData:
    """What is known about the input of linears that are to be rounded."""

    gram: Gram  # of the scaled input
    order: FeedbackOrder | None  # None: to nearest
    clippable: frozenset[str]
    nearest_mse: Mapping[str, Tensor]  # linear -> (out,), of rounding to nearest on the full range; empty: not known


class StackOutcome(NamedTuple):
    """What rounding a stack gave, in the units of the layer as it was; sums stay on the device until they are read."""

    loss: Tensor | float = 0.0  # () fp64: squared output error per token, summed
    loss_scaled: Tensor | float = 0.0  # () fp64: the same of rounding to nearest, scales applied
    rows: int = 0
    rows_nearest: Tensor | int = 0  # () int64
    clip_counts: Tensor | None = None  # (STEPS,) int64, see GroupReport; None: not searched


@dataclass(frozen=True)
class ScaledLinear:
    """A linear on its way to the grid. Its rows are scaled when they are read, so that no copy of the whole exists."""

    name: str
    weight: Tensor  # (out, in) in its own dtype, not scaled
    bias: Tensor | None  # (out,) in its own dtype, scaled
    scales: LinearScales

    def rows(self, span: slice) -> Tensor:
        """Returns rows of the scaled weight, (rows, in) fp32."""
        rows = self.weight[span].float()
        if self.scales.channels is not None:
            rows = rows * self.scales.channels
        return rows if self.scales.rows is None else rows / self.scales.rows[span].unsqueeze(1)

    def unit(self, span: slice) -> Tensor:
        """Returns what a row's squared error is multiplied by to count in the units of the layer as it was, (rows,).

        What a row is divided by, its consumer is multiplied by.
        """
        if self.scales.rows is None:
            return torch.ones_like(self.weight[span, 0], dtype=torch.float32)
        return self.scales.rows[span].square()


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
    """Returns a linear with the scales that are to be applied to it."""
    linear = context.linear(name)
    bias = None if linear.bias is None else linear.bias.detach()
    if bias is not None and scales.rows is not None:
        bias = (bias.float() / scales.rows).to(bias.dtype)
    return ScaledLinear(name, linear.weight.detach(), bias, scales)


def round_and_pack(context: LayerContext, stack: Stack, data: RoundingData) -> tuple[list[nn.Linear], StackOutcome]:
    """Rounds a stack with the clip search and error feedback that `data` asks for, and packs it. See `Rounder`."""
    grid, rounded = context.grid(stack[0].name), _RoundedStack(stack)
    for block in _blocks(stack):
        of_block = _round(block, grid, data)
        rounded.add(block, of_block.codes, of_block.parameters)
        rounded.count(block, of_block, data.clippable)
    return rounded.packed(context, grid), rounded.outcome


def round_to_nearest_and_pack(context: LayerContext, stack: Stack) -> tuple[list[nn.Linear], StackOutcome]:
    """Rounds a stack to nearest, without data: losses are 0."""
    grid, rounded = context.grid(stack[0].name), _RoundedStack(stack)
    for block in _blocks(stack):
        weight = torch.cat([piece.rows for piece in block])
        parameters = group_parameters(group_range(weight, grid), grid)
        rounded.add(block, quantize(weight, parameters, grid), parameters)
    rows = sum(len(linear.weight) for linear in stack)
    return rounded.packed(context, grid), StackOutcome(rows=rows, rows_nearest=rows)


@dataclass(frozen=True)
class _Piece:
    """Rows of one linear of a stack."""

    linear: ScaledLinear
    span: slice

    @property
    def rows(self) -> Tensor:
        """The scaled rows, (rows, in) fp32."""
        return self.linear.rows(self.span)

    def __len__(self) -> int:
        return self.span.stop - self.span.start


def _blocks(stack: Stack) -> Iterator[list[_Piece]]:
    """Yields a stack's rows in blocks of as many weights as may be rounded at once, in order."""
    most_rows = max(1, at_once(STACK_ELEMENTS) // stack[0].weight.shape[1])
    block: list[_Piece] = []
    room = most_rows
    for linear in stack:
        start, n_rows = 0, len(linear.weight)
        while start < n_rows:
            stop = min(n_rows, start + room)
            block.append(_Piece(linear, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield block
                block, room = [], most_rows
    if block:
        yield block


def _round(block: Sequence[_Piece], grid: Grid, data: RoundingData) -> RoundedWeight:
    clipped = nearest_mse = None
    rows = [piece.rows for piece in block]
    if any(piece.linear.name in data.clippable for piece in block):
        ranges = [
            search_clip(own, data.gram, grid) if piece.linear.name in data.clippable else group_range(own, grid)
            for piece, own in zip(block, rows, strict=True)
        ]
        clipped = GroupRange(*map(torch.cat, zip(*ranges, strict=True)))
    if data.nearest_mse:
        nearest_mse = torch.cat(
            [data.nearest_mse[piece.linear.name][piece.span] / piece.linear.unit(piece.span) for piece in block]
        )
    weight = rows[0] if len(rows) == 1 else torch.cat(rows)
    rows.clear()
    return round_weight(weight, data.gram, grid, clipped=clipped, order=data.order, nearest_mse=nearest_mse)


class _RoundedStack:
    """Gathers the codes, the grids and the errors of a stack, block by block."""

    def __init__(self, stack: Stack):
        self.stack = stack
        self.outcome = StackOutcome()
        self._codes = {linear.name: torch.empty_like(linear.weight, dtype=torch.uint8) for linear in stack}
        self._parameters: dict[str, list[GroupParameters]] = {linear.name: [] for linear in stack}

    def add(
        self,
        block: Sequence[_Piece],
        codes: Tensor,  # (rows of the block, in) integers
        parameters: GroupParameters,  # (rows of the block, n)
    ) -> None:
        rows = [len(piece) for piece in block]
        parts = zip(block, codes.split(rows), *(tensor.split(rows) for tensor in parameters), strict=True)
        for piece, own_codes, *own in parts:
            self._codes[piece.linear.name][piece.span] = own_codes.to(torch.uint8)
            self._parameters[piece.linear.name].append(GroupParameters(*own))

    def count(self, block: Sequence[_Piece], rounded: RoundedWeight, clippable: frozenset[str]) -> None:
        """Adds a block's errors to the outcome, without waiting for the device."""
        unit = torch.cat([piece.linear.unit(piece.span) for piece in block])
        loss, loss_scaled = ((mse * unit).sum(dtype=torch.float64) for mse in (rounded.mse, rounded.nearest_mse))
        before = self.outcome
        counts = before.clip_counts
        if rounded.clip_ratio is not None:
            ratios = rounded.clip_ratio.split([len(piece) for piece in block])
            searched = torch.cat(
                [ratio for piece, ratio in zip(block, ratios, strict=True) if piece.linear.name in clippable]
            )
            steps = ((1 - searched) / STEP).round_().long().flatten()
            own = steps.new_zeros(STEPS).index_add_(0, steps, torch.ones_like(steps))  # bincount would wait
            counts = own if counts is None else counts + own
        self.outcome = StackOutcome(
            before.loss + loss,
            before.loss_scaled + loss_scaled,
            before.rows + len(unit),
            before.rows_nearest + (~rounded.improved).sum(),
            counts,
        )

    def packed(self, context: LayerContext, grid: Grid) -> list[nn.Linear]:
        linear_type = linear_class(context.recipe.checkpoint_format)
        packed: list[nn.Linear] = []
        for linear in self.stack:
            codes = self._codes.pop(linear.name)
            parameters = GroupParameters(*map(torch.cat, zip(*self._parameters.pop(linear.name), strict=True)))
            require_finite_result(context, linear.name, codes, parameters, grid)
            packed.append(linear_type.from_codes(codes, parameters, linear.bias, grid, linear.weight.dtype))
        return packed
