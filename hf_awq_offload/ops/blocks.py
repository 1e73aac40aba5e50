"""Dequantizes in blocks of output channels, and multiplies by them. Plain torch, any device.

Each block is written to a buffer that the next block reuses: the buffer stays in the cache, and no full-precision
weight is ever kept. AWQ stores output channels 2i and 2i + 1 of eight, columns of Wᵀ, at bits 4i and 16 + 4i of a word:

    (word >> 4i) & 0x000F000F, read as two int16  ->  columns 2i, 2i + 1

so four shifts of whole words yield eight columns in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from ..formats.awq import BITS, COLUMNS_PER_WORD, PackedWeight, unpack_columns

BLOCK_CHANNELS = 512
"""Output channels of a block: fastest of 256, 512 and 1024 on the CPU of docs/kernels.md, with 4096 input channels."""

PAIR_MASK = 0x000F000F

Codes = Callable[[int, int], Tensor]
"""Maps (first, last) to the integers of output columns first … last - 1, (K, last - first) in any dtype."""

Blocks = Iterable[tuple[slice, Tensor]]
"""Pairs (channels, W[channels]) for all output channels; the next pair reuses the memory of W[channels], (rows, K)."""

BlocksIn = Callable[[torch.dtype], Blocks]
"""Maps a dtype to the blocks of the weight in that dtype."""


def codes_of_words(
    qweight: Tensor,  # (K, N / 8) int32
) -> Codes:
    """Returns a function that reads columns from AWQ words."""

    def codes(first: int, last: int) -> Tensor:
        words = qweight[:, first // COLUMNS_PER_WORD : last // COLUMNS_PER_WORD]
        pairs = torch.empty(*words.shape, COLUMNS_PER_WORD // 2, dtype=torch.int32, device=words.device)
        for i in range(COLUMNS_PER_WORD // 2):
            torch.bitwise_and(words >> (BITS * i), PAIR_MASK, out=pairs[..., i])
        return pairs.view(torch.int16).flatten(-2)

    return codes


def blocks(
    codes: Codes,
    qzeros: Tensor,  # (n, N / 8) int32
    scales: Tensor,  # (n, N)
    in_features: int,
    dtype: torch.dtype,
) -> Blocks:
    """Yields W in `dtype`: (q - z) · Δ is computed in fp32 (fp64 for fp64) and rounded once."""
    n, out_features = scales.shape
    working = torch.promote_types(dtype, torch.float32)
    zeros = unpack_columns(qzeros)
    size = in_features * min(BLOCK_CHANNELS, out_features)
    buffer = torch.empty(size, dtype=working, device=scales.device)
    rounded = buffer if working == dtype else torch.empty(size, dtype=dtype, device=scales.device)
    for first in range(0, out_features, BLOCK_CHANNELS):
        last = min(first + BLOCK_CHANNELS, out_features)
        block = buffer[: in_features * (last - first)].view(n, -1, last - first)
        block.copy_(codes(first, last).view(block.shape))
        block.sub_(zeros[:, None, first:last].to(working)).mul_(scales[:, None, first:last].to(working))
        result = rounded[: block.numel()].view(in_features, last - first)
        if rounded is not buffer:
            result.copy_(block.view(result.shape))
        yield slice(first, last), result.t()


def blocks_of_words(packed: PackedWeight, dtype: torch.dtype) -> Blocks:
    """Does what `blocks` does, with integers from AWQ words."""
    codes = codes_of_words(packed.qweight)
    return blocks(codes, packed.qzeros, packed.scales, packed.qweight.shape[0], dtype)


def joined(
    weight_blocks: Blocks,
    like: Tensor,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the whole weight, contiguous (N, K) in `dtype`, on the device of `like`."""
    weight = like.new_empty(out_features, in_features, dtype=dtype)
    for channels, block in weight_blocks:
        weight[channels] = block
    return weight


def multiply_blocks(
    x: Tensor,  # (M, K)
    weight: BlocksIn,
    out_features: int,
) -> Tensor:
    """Returns x Wᵀ, (M, N) in x's dtype, multiplied in `matmul_dtype`."""
    dtype = matmul_dtype(x.device.type, x.dtype)
    wide = x.to(dtype)
    output = x.new_empty(x.shape[0], out_features)
    for channels, block in weight(dtype):
        output[:, channels] = wide @ block.t()
    return output


def multiply_blocks_back(
    gradient: Tensor,  # (M, N), of x Wᵀ
    weight: BlocksIn,
    in_features: int,
) -> Tensor:
    """Returns the gradient of x, `gradient` W, (M, K) in its dtype; multiplies in `matmul_dtype` and sums in fp32."""
    dtype = matmul_dtype(gradient.device.type, gradient.dtype)
    wide = gradient.to(dtype)
    total = gradient.new_zeros(gradient.shape[0], in_features, dtype=torch.promote_types(dtype, torch.float32))
    for channels, block in weight(dtype):
        if dtype == total.dtype:
            total.addmm_(wide[:, channels], block)
        else:
            total += wide[:, channels] @ block
    return total.to(gradient.dtype)


@cache
def matmul_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to multiply in: fp32 for half precision on a CPU without instructions for it, else `dtype`.

    Such a CPU multiplies bf16 and fp16 matrices several times slower than fp32 ones (docs/log.md).
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    mkldnn = torch.ops.mkldnn
    supported = mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported
    return dtype if supported() else torch.float32
