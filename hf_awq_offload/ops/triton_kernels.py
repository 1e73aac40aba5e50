"""Triton kernels on AWQ words that dequantize, multiply one row, or multiply a tile of rows.

A tile of words (BLOCK_K, BLOCK_N / 8) becomes weights (BLOCK_K, BLOCK_N) in registers. Column c of eight starts at bit

    4 * (c // 2) + 16 * (c % 2)        columns 0 … 7  ->  positions 0 4 1 5 2 6 3 7

of its word. BLOCK_K divides the group size, so that a tile has one scale and one zero point per column. Sums are in
fp32. Both products split K, because a few output tiles would leave most of the GPU idle. Each split writes its own
partial sums, which are then added in a fixed order (atomics would save a few microseconds, but not be reproducible).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_of_weights(
    qweight, qzeros, scales, first_k, columns, words, N, K_GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns BLOCK_K rows of Wᵀ from first_k on, (BLOCK_K, BLOCK_N) fp32; `words` are the words of `columns`."""
    shifts = (tl.arange(0, 8) // 2) * 4 + (tl.arange(0, 8) % 2) * 16
    group = first_k // K_GROUP
    row_words = N // 8
    rows = first_k + tl.arange(0, BLOCK_K)
    is_word = words < row_words
    packed = tl.load(qweight + rows[:, None].to(tl.int64) * row_words + words[None, :], mask=is_word[None, :], other=0)
    codes = tl.reshape((packed[:, :, None] >> shifts[None, None, :]) & 15, (BLOCK_K, BLOCK_N))
    zero_words = tl.load(qzeros + group * row_words + words, mask=is_word, other=0)
    zeros = tl.reshape((zero_words[:, None] >> shifts[None, :]) & 15, (BLOCK_N,))
    scale = tl.load(scales + group * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    return (codes - zeros[None, :]).to(tl.float32) * scale[None, :]


@triton.jit
def dequantize_kernel(
    qweight, qzeros, scales, weight, K, N, K_GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Writes `weight` (N, K), one tile per program."""
    first_k = tl.program_id(0) * BLOCK_K
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(1) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    tile = _tile_of_weights(qweight, qzeros, scales, first_k, columns, words, N, K_GROUP, BLOCK_K, BLOCK_N)
    rows = first_k + tl.arange(0, BLOCK_K)
    target = weight + columns[:, None].to(tl.int64) * K + rows[None, :]
    tl.store(target, tl.trans(tile).to(weight.dtype.element_ty), mask=columns[:, None] < N)


@triton.jit
def gemv_kernel(
    x, qweight, qzeros, scales, partial, K, N, stride_xk, TILES: tl.constexpr, K_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes `partial` (splits, N) fp32 for one row x (K,): a program sums TILES tiles of K for BLOCK_N columns."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    last_k = tl.minimum((split + 1) * TILES * BLOCK_K, K)
    for first_k in range(split * TILES * BLOCK_K, last_k, BLOCK_K):
        tile = _tile_of_weights(qweight, qzeros, scales, first_k, columns, words, N, K_GROUP, BLOCK_K, BLOCK_N)
        values = tl.load(x + (first_k + tl.arange(0, BLOCK_K)) * stride_xk).to(tl.float32)
        total += tl.sum(tile * values[:, None], axis=0)
    tl.store(partial + split * N + columns, total, mask=columns < N)


@triton.jit
def gemm_kernel(
    x, qweight, qzeros, scales, partial, M, K, N, stride_xm, stride_xk, TILES: tl.constexpr, K_GROUP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes `partial` (splits, M, N) fp32: a program sums TILES tiles of K for BLOCK_M rows and BLOCK_N columns.

    It multiplies in x's dtype, or in fp32 if UPCAST is set (Triton's interpreter multiplies bf16 tiles wrongly).
    """
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    last_k = tl.minimum((split + 1) * TILES * BLOCK_K, K)
    for first_k in range(split * TILES * BLOCK_K, last_k, BLOCK_K):
        tile = _tile_of_weights(qweight, qzeros, scales, first_k, columns, words, N, K_GROUP, BLOCK_K, BLOCK_N)
        ks = first_k + tl.arange(0, BLOCK_K)
        source = x + rows[:, None].to(tl.int64) * stride_xm + ks[None, :] * stride_xk
        values = tl.load(source, mask=rows[:, None] < M, other=0.0)
        if UPCAST:
            total += tl.dot(values.to(tl.float32), tile, input_precision="ieee")
        else:
            total += tl.dot(values, tile.to(values.dtype), input_precision="ieee")
    target = partial + (split * M + rows[:, None]).to(tl.int64) * N + columns[None, :]
    tl.store(target, total, mask=(rows[:, None] < M) & (columns[None, :] < N))
