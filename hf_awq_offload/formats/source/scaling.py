"""Weights stored as 8-bit floats or integers beside scales: w = (q - z) · Δ, with Δ for a block, a row or the tensor.

Let w be (…, R, C) and Δ (…, r, c). Three kinds of Δ occur:

    broadcast   every dimension of Δ is 1 or that of w             Δ as it is
    blocks      r = ⌈R / m⌉ and c = ⌈C / n⌉                        w[i, j] has Δ[i // m, j // n]; edges are smaller
    halves      w is two fused weights, each of them in blocks     so in each half of the rows

The size of a block is the config's if it explains the shape of Δ. DeepSeek-V3's `weight_dequant` (inference/kernel.py)
and vLLM read edge blocks so. If it doesn't, the block is (R / r, C / c), as transformers' `Fp8Dequantize` has it, which
refuses edge blocks, and divides 192 rows with two scales into 96 + 96, where the kernels read 128 + 64.

A product is computed in one working dtype, so that it is rounded as the reference rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .records import StoredHeader, contradicts, described

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1: bit 3 is the sign, bits 1 and 2 the exponent, bit 0 the mantissa (OCP Microscaling Formats 1.0, table 5)."""
EXPONENT_BIAS = 127
"""E8M0: a byte b is the scale 2^(b - 127)."""

Block = tuple[int, int]  # rows, columns


class ScaleGrid(NamedTuple):
    """Which scale each value of a weight has."""

    shape: tuple[int, ...]  # to which the stored scales are reshaped: as many dimensions as the weight
    block: Block | None  # None: the scales broadcast
    halves: int = 1  # equal parts of the rows whose blocks are counted on their own

    def label(self) -> str:
        """For people: "blocks of 128 × 128", "a scale for each row", "one scale"."""
        if self.block is not None:
            return "blocks of {} × {}".format(*self.block)
        return "one scale for each tensor" if all(size == 1 for size in self.shape) else "a scale for each channel"


def scale_grid(
    name: str,  # of the weight, for messages
    shape: tuple[int, ...],  # of the weight in full precision, no dimension 0
    scale: StoredHeader,
    blocks: Collection[Block] = (),  # that the config names, or that explain other weights
) -> ScaleGrid:
    """The scale of each value, from the shapes.

    Raises:
        CheckpointError: the shape of the scales doesn't fit that of the weight.
    """
    stored = tuple(scale.shape)
    aligned = _aligned(shape, stored)
    if aligned is None:
        contradicts(f"the scales of {name} are {described(scale)}", f"scales that fit a weight of {shape}")
    if all(size in (1, whole) for size, whole in zip(aligned, shape, strict=True)):
        return ScaleGrid(aligned, None)
    *lead, rows, columns = shape
    *scale_lead, scale_rows, scale_columns = aligned
    if all(size in (1, whole) for size, whole in zip(scale_lead, lead, strict=True)):
        for block in blocks:
            if (scale_rows, scale_columns) == (-(-rows // block[0]), -(-columns // block[1])):
                return ScaleGrid(aligned, block)
        for block in blocks:
            half = -(-(rows // 2) // block[0])
            if rows % 2 == 0 and (scale_rows, scale_columns) == (2 * half, -(-columns // block[1])):
                return ScaleGrid(aligned, block, halves=2)
        if rows % scale_rows == 0 and columns % scale_columns == 0:
            return ScaleGrid(aligned, (rows // scale_rows, columns // scale_columns))
    known = ", ".join(f"{m} × {n}" for m, n in blocks) or "unknown"
    contradicts(
        f"the scales of {name} are {described(scale)}, and its weight is {shape}",
        f"one scale for each block (weight_block_size in the quantization_config: {known})",
    )


def _aligned(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales with as many dimensions as the weight has, or None if that can't be."""
    if 0 in scale:
        return None
    ones = (1,) * len(shape)
    if all(size == 1 for size in scale):
        return ones
    if len(shape) < 2:
        return scale if scale == shape else None
    if len(scale) == len(shape):
        return scale
    if len(shape) == 2 and len(scale) == 4 and scale[1] == scale[3] == 1:
        return (scale[0], scale[2])  # modelopt's FP8_PB_WO
    if scale == shape[: len(scale)]:
        return (*scale, *ones[len(scale) :])  # one for each row, or for each expert
    if len(shape) == 3 and scale == (shape[0], 1):
        return (*scale, 1)
    return None


def common_block(
    shapes: Collection[tuple[tuple[int, ...], tuple[int, ...]]],  # (weight, scales)
) -> Block | None:
    """The block that most weights have, for a checkpoint whose config names none."""
    counts: dict[Block, int] = {}
    for shape, scale in shapes:
        aligned = _aligned(shape, scale) if len(shape) >= 2 and 0 not in shape else None
        if aligned is None or all(size in (1, whole) for size, whole in zip(aligned, shape, strict=True)):
            continue
        rows, columns = shape[-2:]
        if rows % aligned[-2] == 0 and columns % aligned[-1] == 0:
            block = (rows // aligned[-2], columns // aligned[-1])
            counts[block] = counts.get(block, 0) + 1
    return max(counts, key=lambda block: (counts[block], block)) if counts else None


def scales_of(stored: Tensor) -> Tensor:
    """Stored scales in fp32; bytes are exponents (E8M0)."""
    if stored.dtype == torch.uint8:
        return (stored.to(torch.float32) - EXPONENT_BIAS).exp2()
    return stored.to(torch.float32)


def dequantize_scaled(
    parts: Mapping[str, Tensor],  # "weight" (…, R, C), "scale", and maybe "zero"
    grid: ScaleGrid,
    dtype: torch.dtype,  # in which the product is computed and returned
    packed: bool = False,  # two fp4 in each byte of the weight
) -> Tensor:
    """(q - z) · Δ, in the weight's shape."""
    scale = scales_of(parts["scale"]) if dtype == torch.float32 else parts["scale"].to(dtype)
    weight = unpack_fp4(parts["weight"]).to(dtype) if packed else _copied(parts["weight"], dtype)
    zero = parts.get("zero")
    if zero is not None:
        _combine(weight, zero.to(dtype), grid, torch.Tensor.sub_)
    return _combine(weight, scale, grid, torch.Tensor.mul_)


def _copied(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in `dtype`."""
    return torch.empty(weight.shape, dtype=dtype).copy_(weight)


def _combine(
    weight: Tensor,  # (…, R, C), contiguous
    stored: Tensor,  # of `grid.shape` or a shape with as many values
    grid: ScaleGrid,
    operation: Callable[[Tensor, Tensor], Tensor],  # torch.Tensor.mul_ or sub_, in place
) -> Tensor:
    """Applies `operation` to each value and its scale, in place. No tensor of the weight's size is made."""
    values = stored.reshape(grid.shape)
    if grid.block is None:
        operation(weight, values)
        return weight
    rows, columns = weight.shape[-2:]
    of_row = _row_indices(rows, grid)
    values = values.index_select(-2, of_row)  # (…, R, c)
    width = grid.block[1]
    whole, rest = divmod(columns, width)
    if whole:
        operation(weight[..., : whole * width].unflatten(-1, (whole, width)), values[..., :whole, None])
    if rest:
        operation(weight[..., whole * width :], values[..., whole:])
    return weight


def _row_indices(rows: int, grid: ScaleGrid) -> Tensor:
    """The row of scales that each row of the weight has, (R,)."""
    assert grid.block is not None
    part = rows // grid.halves
    scale_rows = grid.shape[-2] // grid.halves
    one = torch.arange(part) // min(grid.block[0], max(part, 1))  # a config may name any size
    return torch.cat([one + half * scale_rows for half in range(grid.halves)])


def unpack_fp4(
    packed: Tensor,  # (…, C / 2), two values in each byte, the first in the lower half
) -> Tensor:
    """(…, C) bf16, which holds every fp4 exactly."""
    return unpack_pairs(packed, torch.tensor(FP4_VALUES, dtype=torch.bfloat16), first_is_low=True)


def unpack_pairs(
    packed: Tensor,  # (…, C / 2), one byte for two values
    values: Tensor,  # (16,) of 2 or 4 bytes each
    first_is_low: bool,  # whether the first value is in the lower half of a byte
) -> Tensor:
    """(…, C): the value of each half byte, in the dtype of `values`.

    A pair of values is looked up as one integer with `index_select`, which is 16 times as fast as indexing a (256, 2)
    table.
    """
    low, high = values.repeat(16), values.repeat_interleave(16)
    pairs = torch.stack([low, high] if first_is_low else [high, low], dim=1)  # (256, 2)
    table = pairs.view({2: torch.int32, 4: torch.int64}[values.element_size()]).flatten()
    stored = packed.contiguous().view(torch.uint8)
    return table.index_select(0, stored.flatten().to(torch.int32)).view(values.dtype).view(*packed.shape[:-1], -1)
