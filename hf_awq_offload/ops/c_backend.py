"""Runs C kernels that the system's compiler builds once: a fused product for few rows, fast dequantization for many.

The kernels read the AWQ words as they are stored, so no other layout is ever made, and compute in fp32 for every input
dtype. See c_kernels/ and c_library.py.
"""

from __future__ import annotations

from ctypes import CDLL
from functools import partial

import torch
from torch import Tensor

from ..formats.awq import COLUMNS_PER_WORD, PackedWeight
from .backend import LinearShape, WordsBackend
from .blocks import BLOCK_CHANNELS, Blocks, matmul_dtype, multiply_blocks
from .c_library import DTYPES, library, weight_arguments

FEW_ROWS = {torch.float32: 256, torch.bfloat16: 32, torch.float16: 32}
"""Most rows for which the fused product beats a product with dequantized blocks, by the dtype of the latter. Measured
for fp32 (docs/kernels.md); the others apply to CPUs with instructions for these dtypes, and are estimates."""
CHANNELS_PER_BLOCK = 64
"""Output channels that the fused product computes together: BLOCK_COLUMNS in c_kernels/product.c."""
CACHE_BYTES = 128 * 2**10
"""Bytes of sums in one part of a product: no size from 32 to 256 KiB is faster on the CPU of docs/kernels.md."""
PRODUCTS_PER_THREAD = 2**18
"""Multiplications below which another thread costs more time than it saves."""
WEIGHTS_PER_THREAD = 2**16
"""Weights to dequantize below which it does not pay either; each takes about as long as four multiplications."""
THREADS_PER_BLOCK = 4
"""Threads that a block of BLOCK_CHANNELS keeps busy; more threads get larger blocks. An estimate: two were measured."""
MOST_CHANNELS = 4096
"""Most output channels in a block."""


class CBackend(WordsBackend):
    """Multiplies with the C kernels; see the module."""

    name = "c"

    def refusal(self, linear: LinearShape) -> str | None:
        if linear.device.type != "cpu":
            return f"it runs on the CPU only, the input is on {linear.device.type!r}"
        if linear.dtype not in DTYPES:
            return f"it computes in fp32, which is not precise enough for {linear.dtype}"
        kernels = library()
        return kernels if isinstance(kernels, str) else None

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        packed = _readable(packed)
        dtype = matmul_dtype("cpu", x.dtype)
        return product(x, packed) if x.shape[0] <= FEW_ROWS[dtype] else product_in_blocks(x, packed)

    def blocks(self, packed: PackedWeight, dtype: torch.dtype) -> Blocks:
        return _blocks(_readable(packed), dtype)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        packed = _readable(packed)
        in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
        weight = packed.scales.new_empty(out_features, in_features, dtype=dtype)
        _dequantize(packed, slice(0, out_features), weight)
        return weight


def product(
    x: Tensor,  # (M, K) in one of DTYPES
    packed: PackedWeight,
) -> Tensor:
    """Returns x Wᵀ, (M, N), computed by the fused kernel in fp32 and rounded once to x's dtype."""
    x = x.contiguous()
    (rows, in_features), (_, out_features) = x.shape, packed.scales.shape
    output = x.new_empty(rows, out_features)
    sums = max(rows, 2) * _round_up(out_features, CHANNELS_PER_BLOCK)
    scratch = x.new_empty(rows * in_features + sums, dtype=torch.float32)
    threads = _threads(rows * in_features * out_features, PRODUCTS_PER_THREAD)
    _kernels().awq_product(
        *weight_arguments(packed), x.data_ptr(), rows, DTYPES[x.dtype], output.data_ptr(), scratch.data_ptr(),
        CACHE_BYTES, threads,
    )  # fmt: skip
    return output


def product_in_blocks(x: Tensor, packed: PackedWeight) -> Tensor:
    """Returns x Wᵀ, (M, N), multiplied by dequantized blocks of output channels."""
    return multiply_blocks(x, partial(_blocks, packed), packed.scales.shape[1])


def _blocks(packed: PackedWeight, dtype: torch.dtype) -> Blocks:
    """Yields W in `dtype`.

    All blocks share one buffer: fresh memory for each would cost more than dequantizing, because the system allocates
    it page by page.
    """
    in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
    size = min(BLOCK_CHANNELS * max(1, torch.get_num_threads() // THREADS_PER_BLOCK), MOST_CHANNELS, out_features)
    buffer = packed.scales.new_empty(size, in_features, dtype=dtype)
    for first in range(0, out_features, size):
        channels = slice(first, min(first + size, out_features))
        block = buffer[: channels.stop - first]
        _dequantize(packed, channels, block)
        yield channels, block


def _dequantize(
    packed: PackedWeight,
    channels: slice,
    block: Tensor,  # contiguous (channels, K) in one of DTYPES
) -> None:
    """Writes W[channels] to `block`."""
    words = (channel // COLUMNS_PER_WORD for channel in (channels.start, channels.stop))
    threads = _threads(block.numel(), WEIGHTS_PER_THREAD)
    _kernels().awq_dequantize(
        *weight_arguments(packed), *words, block.data_ptr(), DTYPES[block.dtype], threads
    )  # fmt: skip


def _kernels() -> CDLL:
    kernels = library()
    assert isinstance(kernels, CDLL), kernels
    return kernels


def _readable(packed: PackedWeight) -> PackedWeight:
    """Returns the tensors as the kernels read them; copies only tensors with an unusual layout or dtype."""
    qweight, qzeros, scales = (tensor.contiguous() for tensor in packed)
    return PackedWeight(qweight, qzeros, scales if scales.dtype in DTYPES else scales.float())


def _threads(work: int, work_per_thread: int) -> int:
    return min(torch.get_num_threads(), 1 + work // work_per_thread)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


BACKEND = CBackend()
