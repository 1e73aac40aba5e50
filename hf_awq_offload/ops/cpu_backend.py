"""Multiplies on the CPU with `aten._weight_int4pack_mm_for_cpu` for few rows, and by dequantized blocks for many.

    the op computes  w = (q - 8) · scale + zero,  so zero = (8 - z) · scale,  all in bf16

The op is a bf16 kernel, and other dtypes are cast around it (its fp32 and fp16 path is scalar and ten times slower than
a dense product). To opt out of that, choose backend "torch". The op's layout depends on the CPU: it consists of blocks
of output channels, in which the bytes of one input channel are contiguous. The block size and the order inside a block
are detected once per process by packing known integers; the layout is never stored in a checkpoint.

Rejected: keeping the AWQ words beside the packed ones (permanently twice the memory), and recovering the words by a
product with the identity (about 8 s for 4096² at the op's rate with AVX2).
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.awq import PackedWeight, pack_columns, unpack_columns
from .backend import LinearShape, NativeBackend, NativeWeight
from .blocks import Blocks, Codes, blocks, codes_of_words, multiply_blocks

KERNEL_GROUP_SIZES = (256, 128, 64, 32)
FEW_ROWS = 48
"""Most rows for which the op beats dequantizing first. With AVX2 the two break even here (docs/kernels.md); on a CPU
with AMX the design measured the break-even between 32 and 128 rows."""
PACK_COLUMNS = 1024
"""Output channels packed at a time, which limits the int32 copy that the packing op needs."""


class Layout(NamedTuple):
    """The order of the packed bytes: (N / block, K, block / 2) bytes of two output channels each."""

    block: int
    halves: bool  # byte j holds channels j and j + block / 2; else 2j and 2j + 1 (low bits first)


class CpuBackend(NativeBackend):
    """Multiplies with torch's int4 op for the CPU; see the module."""

    name = "cpu"

    def refusal(self, linear: LinearShape) -> str | None:
        if linear.device.type != "cpu":
            return f"it runs on the CPU only, the input is on {linear.device.type!r}"
        if linear.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"it computes in bf16, which is not precise enough for {linear.dtype}"
        layout = cpu_layout()
        if layout is None:
            return "torch's int4 packing is unavailable on this CPU, or has an unknown layout"
        if linear.out_features % layout.block:
            return f"out_features {linear.out_features} is not a multiple of {layout.block}, this CPU's block"
        if kernel_group_size(linear.group_size) is None:
            return f"group size {linear.group_size} is not a multiple of {KERNEL_GROUP_SIZES[-1]}"
        return None

    def pack(self, packed: PackedWeight) -> NativeWeight:
        qweight, qzeros, scales = packed
        in_features, out_features = qweight.shape[0], scales.shape[1]
        words = qweight.new_empty(out_features, in_features // 2, dtype=torch.uint8)
        codes = codes_of_words(qweight)
        for first in range(0, out_features, PACK_COLUMNS):
            last = min(first + PACK_COLUMNS, out_features)
            chunk = codes(first, last).t().to(torch.int32, memory_format=torch.contiguous_format)
            words[first:last] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(chunk, 1)
        scale = scales.to(torch.bfloat16)
        zero = ((8 - unpack_columns(qzeros).float()) * scale.float()).to(torch.bfloat16)
        group_size = in_features // scales.shape[0]
        kernel_size = kernel_group_size(group_size)
        assert kernel_size is not None
        parameters = torch.stack([scale, zero], dim=-1).repeat_interleave(group_size // kernel_size, dim=0)
        return NativeWeight(words, parameters.contiguous())

    def unpack(self, words: Tensor, in_features: int, out_features: int) -> Tensor:
        codes = codes_of_native(words, in_features)
        qweight = torch.empty(in_features, out_features // 8, dtype=torch.int32, device=words.device)
        for first in range(0, out_features, PACK_COLUMNS):
            last = min(first + PACK_COLUMNS, out_features)
            qweight[:, first // 8 : last // 8] = pack_columns(codes(first, last))
        return qweight

    def linear(self, x: Tensor, native: NativeWeight, qzeros: Tensor, scales: Tensor) -> Tensor:
        if native.words.shape != (scales.shape[1], x.shape[1] // 2) or native.parameters.ndim != 3:
            raise ValueError(
                f"Packed words {tuple(native.words.shape)} are not those of a linear of {x.shape[1]} to "
                f"{scales.shape[1]} channels."
            )
        if x.shape[0] > FEW_ROWS:
            weight = partial(self.blocks, native.words, qzeros, scales, x.shape[1])
            return multiply_blocks(x, weight, scales.shape[1])
        group_size = x.shape[1] // native.parameters.shape[0]
        output = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16).contiguous(), native.words, group_size, native.parameters
        )
        return output.to(x.dtype)

    def blocks(self, words: Tensor, qzeros: Tensor, scales: Tensor, in_features: int, dtype: torch.dtype) -> Blocks:
        return blocks(codes_of_native(words, in_features), qzeros, scales, in_features, dtype)


BACKEND = CpuBackend()


def kernel_group_size(group_size: int) -> int | None:
    """Returns the largest group size of the op that divides `group_size`; None if there is none."""
    return next((size for size in KERNEL_GROUP_SIZES if group_size % size == 0), None)


def codes_of_native(
    words: Tensor,  # (N, K / 2) uint8 in this CPU's layout
    in_features: int,
) -> Codes:
    """Returns a function that reads columns `first` to `last`, multiples of the block size, from the op's layout."""
    layout = cpu_layout()
    assert layout is not None
    return lambda first, last: _read(words[first:last], in_features, layout)


@cache
def cpu_layout() -> Layout | None:
    """Detects this CPU's layout by packing random integers; None if it is none of the known layouts."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (256, 64), generator=generator, dtype=torch.int32)
    try:
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    for block in (64, 32, 16):
        for halves in (True, False):
            layout = Layout(block, halves)
            if words.numel() == codes.numel() // 2 and torch.equal(_read(words, 64, layout).t().int(), codes):
                return layout
    return None


def _read(
    words: Tensor,  # (rows, K / 2) uint8, whole blocks
    in_features: int,
    layout: Layout,
) -> Tensor:
    """Unpacks whole blocks to (K, rows) uint8, values 0 … 15."""
    bytes_ = words.view(-1, in_features, layout.block // 2)
    codes = torch.empty(in_features, bytes_.shape[0], 2, layout.block // 2, dtype=torch.uint8, device=words.device)
    by_block = codes.permute(1, 0, 2, 3)
    if layout.halves:
        torch.bitwise_and(bytes_, 0xF, out=by_block[:, :, 0])
        torch.bitwise_right_shift(bytes_, 4, out=by_block[:, :, 1])
        return codes.view(in_features, -1)
    pairs = torch.stack([bytes_ & 0xF, bytes_ >> 4], dim=-1)
    return pairs.permute(1, 0, 2, 3).reshape(in_features, -1)
