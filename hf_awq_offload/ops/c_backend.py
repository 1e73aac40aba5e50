"""Kernels in C, compiled once by the system's compiler: a fused product for few rows, fast dequantization for many.

They read the AWQ words as they are stored, so that no other layout is ever made, and compute in fp32 whatever the
input's dtype. See c_kernels/ and c_library.py.
"""

from __future__ import annotations

from ctypes import CDLL, byref
from math import gcd

import torch
from torch import Tensor

from ..packing import COLUMNS_PER_WORD, PackedWeight
from .backend import Case, WordsBackend
from .blocks import BLOCK_CHANNELS, Blocks, matmul_dtype, multiply_blocks
from .c_library import DTYPES, CWeight, address, library

FEW_ROWS = {torch.float32: 256, torch.bfloat16: 32, torch.float16: 32}
"""Most rows for which the fused product beats a product with dequantized blocks, by the dtype of the latter. Measured
for fp32 (docs/kernels.md); the others concern CPUs with instructions for them, where it is an estimate."""
MOST_DEPTH = 32
"""Most input channels multiplied at a time, as in c_kernels/product.c."""
WORDS_PER_BLOCK = 8
CACHE_BYTES = 128 * 2**10
"""Sums that one part of a product may hold: of 32 to 256 KiB none is faster on the CPU of docs/kernels.md."""
PRODUCTS_PER_THREAD = 2**18
"""Multiplications below which another thread costs more than it saves."""


class CBackend(WordsBackend):
    """See the module."""

    name = "c"

    def refusal(self, case: Case) -> str | None:
        if case.device_type != "cpu":
            return f"it runs on the CPU only, the input is on {case.device_type!r}"
        if case.dtype not in DTYPES:
            return f"it computes in fp32, which is too coarse for {case.dtype}"
        kernels = library()
        return kernels if isinstance(kernels, str) else None

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        packed = _readable(packed)
        dtype = matmul_dtype("cpu", x.dtype)
        return product(x, packed) if x.shape[0] <= FEW_ROWS[dtype] else product_in_blocks(x, packed, dtype)

    def blocks(self, packed: PackedWeight, dtype: torch.dtype) -> Blocks:
        return _blocks(_readable(packed), dtype)

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        packed = _readable(packed)
        in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
        weight = packed.scales.new_empty(out_features, in_features, dtype=dtype)
        _dequantize(packed, slice(0, out_features), weight)
        return weight


def product(x: Tensor, packed: PackedWeight) -> Tensor:
    """x Wᵀ by the fused kernel, in fp32, rounded to x's dtype once."""
    weight = CWeight.of(packed)
    rows, width = x.shape[0], weight.width
    depth = gcd(MOST_DEPTH, weight.group_size)
    slices = x.float().contiguous()
    if rows > 1:
        slices = slices.view(rows, -1, depth).transpose(0, 1).contiguous()
    output = slices.new_empty(rows, width * COLUMNS_PER_WORD)
    sums = slices.new_empty(max(rows, 2) * _round_up(width, WORDS_PER_BLOCK) * COLUMNS_PER_WORD)
    threads = _threads(x.numel() * output.shape[1])
    parts = _round_up(-(-sums.nbytes // CACHE_BYTES), threads)
    part_width = _round_up(-(-width // parts), WORDS_PER_BLOCK)
    _kernels().awq_product(
        byref(weight), address(slices), rows, depth, address(output), address(sums), part_width, threads
    )
    return output.to(x.dtype)


def product_in_blocks(x: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """x Wᵀ multiplied in `dtype`, with blocks of output channels that are dequantized before."""
    return multiply_blocks(x, _blocks(packed, dtype), packed.scales.shape[1], dtype)


def _blocks(packed: PackedWeight, dtype: torch.dtype) -> Blocks:
    """W in `dtype`.

    Memory that is new for each block would cost more than dequantizing: the system hands it out page by page.
    """
    in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
    buffer = packed.scales.new_empty(min(BLOCK_CHANNELS, out_features), in_features, dtype=dtype)
    for first in range(0, out_features, BLOCK_CHANNELS):
        channels = slice(first, min(first + BLOCK_CHANNELS, out_features))
        block = buffer[: channels.stop - first]
        _dequantize(packed, channels, block)
        yield channels, block


def _dequantize(
    packed: PackedWeight,
    channels: slice,
    block: Tensor,  # contiguous (channels, K) in one of DTYPES
) -> None:
    """Writes W[channels] to `block`."""
    weight = CWeight.of(packed)
    words = (channel // COLUMNS_PER_WORD for channel in (channels.start, channels.stop))
    _kernels().awq_dequantize(byref(weight), *words, address(block), DTYPES[block.dtype], _threads(block.numel()))


def _kernels() -> CDLL:
    kernels = library()
    assert isinstance(kernels, CDLL), kernels
    return kernels


def _readable(packed: PackedWeight) -> PackedWeight:
    """The tensors as the kernels read them; copies only where something is unusual."""
    qweight, qzeros, scales = (tensor.contiguous() for tensor in packed)
    return PackedWeight(qweight, qzeros, scales if scales.dtype in DTYPES else scales.float())


def _threads(products: int) -> int:
    return min(torch.get_num_threads(), 1 + products // PRODUCTS_PER_THREAD)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


BACKEND = CBackend()
