"""Triton kernels on AWQ words that dequantize, multiply one row, or multiply a tile of rows.

Column c of eight starts at bit 16 * (c % 2) + b, b = 4 * (c // 2), of its word:

    columns 0 … 7  ->  positions 0 4 1 5 2 6 3 7 of four bits

0x4B000000 are the bits of 2²³ in fp32, whose last place is 1. With them in front, (word >> 16 * (c % 2)) & (15 << b) is
the number 2²³ + q · 2ᵇ. Subtracting 2²³ + z · 2ᵇ, and multiplying by scale · 2⁻ᵇ, gives (q - z) · scale to the bit,
without converting integers to floating point, which GPUs do at a quarter of the speed or less.

Both products divide K into segments that lie within a group, and a step takes one segment per warp. A thread loads 16
bytes, 4 words of one row of `qweight`, and keeps their 32 columns in registers. Sums are in fp32, and a program adds up
its columns over all of K: there is one launch, no scratch memory, and one order of summation, whatever else runs on the
GPU. Rejected: more programs that each sum a part of K. They would need a counter per tile to tell which is the last,
memory for partial sums, and at the end a chain of a store, an atomic and a load of the others' sums through the L2
cache; docs/kernels.md estimates both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _column(words, C: tl.constexpr):
    """Returns 2²³ + q · 2ᵇ of column C of each word, fp32."""
    return (((words >> (16 * (C % 2))) & (15 << (4 * (C // 2)))) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _columns(words):
    """Returns 2²³ + q · 2ᵇ of all columns, (…, words, 2, 2, 2) fp32, in the thread that has the word."""
    even_low, even_high = tl.join(_column(words, 0), _column(words, 4)), tl.join(_column(words, 2), _column(words, 6))
    odd_low, odd_high = tl.join(_column(words, 1), _column(words, 5)), tl.join(_column(words, 3), _column(words, 7))
    return tl.join(tl.join(even_low, even_high), tl.join(odd_low, odd_high))


@triton.jit
def _parameters(qzeros, scales, groups, are_groups, row_words, BLOCK_N: tl.constexpr):
    """Returns 2²³ + z · 2ᵇ and scale · 2⁻ᵇ, (groups, BLOCK_N) fp32 each, of the columns of program_id(0)."""
    column = tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) * BLOCK_N + column
    mask = are_groups[:, None] & (columns < row_words * 8)[None, :]
    shift, bit = (column % 2) * 16, ((column % 8) // 2) * 4
    words = tl.load(qzeros + groups[:, None] * row_words + (columns // 8)[None, :], mask=mask, other=0)
    zeros = (((words >> shift[None, :]) & (15 << bit)[None, :]) | 0x4B000000).to(tl.float32, bitcast=True)
    scale = tl.load(scales + groups[:, None] * (row_words * 8) + columns[None, :], mask=mask, other=0.0)
    unit = ((127 - bit) << 23).to(tl.float32, bitcast=True)  # 2⁻ᵇ
    return zeros, scale.to(tl.float32) * unit[None, :]


@triton.jit
def dequantize_kernel(
    qweight, qzeros, scales, weight, K, row_words, K_GROUP: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr
):
    """Writes `weight` (N, K), one tile per program."""
    BLOCK_N: tl.constexpr = WORDS * 8
    first_k = tl.program_id(1) * BLOCK_K
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    rows = first_k + tl.arange(0, BLOCK_K)
    source = qweight + rows[:, None].to(tl.int64) * row_words + words[None, :]
    packed = tl.load(source, mask=(words < row_words)[None, :], other=0)
    groups = first_k // K_GROUP + tl.arange(0, 1)
    zeros, scale = _parameters(qzeros, scales, groups, groups >= 0, row_words, BLOCK_N)
    tile = (tl.reshape(_columns(packed), (BLOCK_K, BLOCK_N)) - zeros) * scale
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = weight + columns[:, None].to(tl.int64) * K + rows[None, :]
    tl.store(target, tl.trans(tile).to(weight.dtype.element_ty), mask=columns[:, None] < row_words * 8)


@triton.jit
def gemv_kernel(
    x, qweight, qzeros, scales, bias, output, row_words, segments, HAS_BIAS: tl.constexpr,
    K_GROUP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, SEGMENTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Writes `output` (N,) for one contiguous row x (K,): a program computes WORDS * 8 columns.

    A segment has STEPS * LANES rows of `qweight`, and `segments` of them are K. Each thread multiplies STEPS rows
    before it needs the scales.
    """
    BLOCK_N: tl.constexpr = WORDS * 8
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    row = tl.arange(0, STEPS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    total = tl.zeros((SEGMENTS, LANES, BLOCK_N), dtype=tl.float32)
    for first in range(0, segments, SEGMENTS):
        segment = first + tl.arange(0, SEGMENTS)
        inside = segment < segments
        ks = segment[None, :, None] * (STEPS * LANES) + row  # (STEPS, SEGMENTS, LANES)
        source = qweight + ks[:, :, :, None].to(tl.int64) * row_words + words[None, None, None, :]
        packed = tl.load(
            source, mask=inside[None, :, None, None] & (words < row_words)[None, None, None, :], other=0
        )  # fmt: skip
        values = tl.load(x + ks, mask=inside[None, :, None], other=0.0).to(tl.float32)
        groups = segment * (STEPS * LANES) // K_GROUP
        zeros, scale = _parameters(qzeros, scales, groups, inside, row_words, BLOCK_N)
        codes = tl.reshape(_columns(packed), (STEPS, SEGMENTS, LANES, BLOCK_N)) - zeros[None, :, None, :]
        total += tl.sum(codes * values[:, :, :, None], axis=0) * scale[:, None, :]
    sums = tl.sum(tl.reshape(total, (SEGMENTS * LANES, BLOCK_N)), axis=0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < row_words * 8, other=0.0).to(tl.float32)
    tl.store(output + columns, sums.to(output.dtype.element_ty), mask=columns < row_words * 8)


@triton.jit
def gemm_kernel(
    x, qweight, qzeros, scales, bias, output, M, row_words, segments, stride_xm, HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr, K_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Writes `output` (M, N) for contiguous rows of x: a program computes BLOCK_M rows and WORDS * 8 columns.

    Each warp multiplies a segment of BLOCK_K channels of its own: a few rows and columns make too few tiles to share.
    x is multiplied by q - z, which is exact in any dtype, and the sums of a segment by the scales. The products are in
    x's dtype, or in fp32 if UPCAST is set (Triton's interpreter multiplies bf16 tiles wrongly).
    """
    BLOCK_N: tl.constexpr = WORDS * 8
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((SEGMENTS, BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, segments, SEGMENTS):
        segment = first + tl.arange(0, SEGMENTS)
        inside = segment < segments
        ks = segment[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        source = qweight + ks[:, :, None].to(tl.int64) * row_words + words[None, None, :]
        packed = tl.load(source, mask=inside[:, None, None] & (words < row_words)[None, None, :], other=0)
        source_x = x + rows[None, :, None].to(tl.int64) * stride_xm + ks[:, None, :]
        values = tl.load(source_x, mask=inside[:, None, None] & (rows < M)[None, :, None], other=0.0)
        zeros, scale = _parameters(qzeros, scales, segment * BLOCK_K // K_GROUP, inside, row_words, BLOCK_N)
        # (q - z) · 2ᵇ has four significant bits, and 2⁻ᵇ is part of the scale.
        codes = tl.reshape(_columns(packed), (SEGMENTS, BLOCK_K, BLOCK_N)) - zeros[:, None, :]
        if UPCAST:
            products = tl.dot(values.to(tl.float32), codes, input_precision="ieee")
        else:
            products = tl.dot(values, codes.to(values.dtype), input_precision="ieee")
        total += products * scale[:, None, :]
    sums = tl.sum(total, axis=0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < row_words * 8, other=0.0).to(tl.float32)[None, :]
    target = output + rows[:, None].to(tl.int64) * (row_words * 8) + columns[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < row_words * 8))
