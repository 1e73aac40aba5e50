"""The quantization grid: group-wise integers with a scale and a zero point per group. Pure functions.

    w ≈ (q - z) · Δ,   q ∈ {0 … 2^b - 1},   one (Δ, z) for `group_size` consecutive input channels of a row

Asymmetric, from a range [lo, hi] that holds zero:  Δ = (hi - lo) / (2^b - 1),  z = -round(lo / Δ)
Symmetric, from a range |w| ≤ m:                    Δ = m / (2^(b-1) - 1),      z = 2^(b-1)

The range is AutoAWQ's (Lin et al. 2023, arXiv:2306.00978, section 3.2). Unlike AutoAWQ, this package rounds Δ to fp16,
the precision it is stored in, *before* it divides the weights by it: the integers are then the nearest ones on the grid
that a reader reconstructs.

Shapes: out = rows (output channels), in = input channels, n = groups per row = in / group_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
"""The AWQ format stores scales in this dtype, whatever the model's dtype."""

LARGEST_BF16_SCALE = 65280.0
"""The largest number that is exact in both bf16 and fp16."""

MIN_RANGE = 1e-5
"""The narrowest range of a group; it keeps Δ representable in fp16 where a group is all zeros."""


@dataclass(frozen=True)
class Grid:
    """Bits, groups and kind of a quantization grid. `group_size` is resolved: positive, never -1."""

    bits: int
    group_size: int
    zero_point: bool
    scale_dtype: torch.dtype = SCALE_DTYPE
    """The dtype that holds the scales, fp16 or bf16."""

    @property
    def levels(self) -> int:
        """The largest integer on the grid, 2^bits - 1."""
        return 2**self.bits - 1

    def groups(self, weight: Tensor) -> Tensor:
        """Views (out, in) as (out, n, group_size)."""
        return weight.unflatten(-1, (-1, self.group_size))


class GroupRange(NamedTuple):
    """The range that a group's grid must cover: low ≤ 0 ≤ high, both (out, n)."""

    low: Tensor
    high: Tensor


class GroupParameters(NamedTuple):
    """Scale Δ and zero point z of every group, both (out, n) in the weight's dtype; Δ is exact in fp16."""

    scale: Tensor
    zero: Tensor


def resolve_group_size(
    group_size: int,
    in_features: int,  # input channels
) -> int:
    """The number of input channels in a group; -1 means one group for the whole row."""
    return in_features if group_size == -1 else group_size


def group_range(
    weight: Tensor,  # (out, in)
    grid: Grid,
) -> GroupRange:
    """The range of every group, widened to include zero: an integer zero point needs that."""
    groups = grid.groups(weight)
    low, high = torch.aminmax(groups, dim=-1)
    return GroupRange(low.clamp(max=0), high.clamp(min=0))


def group_parameters(ranges: GroupRange, grid: Grid) -> GroupParameters:
    """The scale and zero point that map `ranges` onto the integers; see the module's formulas."""
    scale = stored_scale(exact_scale(ranges, grid), grid)
    if grid.zero_point:
        return GroupParameters(scale, _least_integer(ranges, scale, grid).neg_())
    return GroupParameters(scale, torch.full_like(scale, grid.levels // 2 + 1))


def exact_scale(ranges: GroupRange, grid: Grid) -> Tensor:
    """The scale of `ranges` before it is rounded as the format stores it, (out, n)."""
    low, high = ranges
    if grid.zero_point:
        return (high - low).clamp(min=MIN_RANGE) / grid.levels
    return torch.maximum(-low, high).clamp(min=MIN_RANGE) / (grid.levels // 2)


def quantize(
    weight: Tensor,  # (out, in)
    parameters: GroupParameters,
    grid: Grid,
) -> Tensor:
    """The nearest integers on the grid, (out, in) in the weight's dtype; values outside the range saturate."""
    scale, zero = (parameter.unsqueeze(-1) for parameter in parameters)
    codes = torch.round(grid.groups(weight) / scale).add_(zero).clamp_(0, grid.levels)
    return codes.flatten(-2)


def dequantize(
    codes: Tensor,  # (out, in)
    parameters: GroupParameters,
    grid: Grid,
) -> Tensor:
    """(q - z) · Δ, (out, in) in the scale's dtype."""
    scale, zero = (parameter.unsqueeze(-1) for parameter in parameters)
    return ((grid.groups(codes) - zero) * scale).flatten(-2)


def quantize_dequantize(
    weight: Tensor,  # (out, in)
    grid: Grid,
    ranges: GroupRange | None = None,
) -> Tensor:
    """The nearest weight that the grid can represent, (out, in). `ranges` defaults to the weight's own.

    Equals `dequantize(quantize(…))`, in fewer passes over the weight.
    """
    ranges = group_range(weight, grid) if ranges is None else ranges
    scale = stored_scale(exact_scale(ranges, grid), grid)
    integers = (grid.groups(weight) / scale.unsqueeze(-1)).round_()
    if grid.zero_point:
        least = _least_integer(ranges, scale, grid).unsqueeze(-1)
        integers.clamp_(least, least + grid.levels)
    else:
        integers.clamp_(-(grid.levels // 2 + 1), grid.levels // 2)
    return integers.mul_(scale.unsqueeze(-1)).flatten(-2)


def stored_scale(scale: Tensor, grid: Grid) -> Tensor:
    """Rounds a positive scale as the format stores it: at least the smallest fp16 step, at most the largest finite."""
    info = torch.finfo(SCALE_DTYPE)
    within = scale.clamp(info.smallest_normal * info.eps, largest_scale(grid))  # both are exact in either dtype
    return within.to(grid.scale_dtype).to(SCALE_DTYPE).to(scale.dtype)


def largest_scale(grid: Grid) -> float:
    """The largest scale that the format can store; `stored_scale` cuts off what is larger."""
    return torch.finfo(SCALE_DTYPE).max if grid.scale_dtype == SCALE_DTYPE else LARGEST_BF16_SCALE


def _least_integer(
    ranges: GroupRange,
    scale: Tensor,  # (out, n)
    grid: Grid,
) -> Tensor:
    """The integer that the low end of each range is rounded to, -z, (out, n); at least -(2^b - 1)."""
    return (ranges.low / scale).round_().clamp_(-grid.levels, 0)
