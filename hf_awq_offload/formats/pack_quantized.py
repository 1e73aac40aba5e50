"""How compressed-tensors' pack-quantized format packs b-bit integers into int32 words. Pure functions.

Format: compressed-tensors 0.18 and later, `PackedQuantizationCompressor`, read by vLLM, SGLang and transformers; shapes
in layouts.py.

A row of `weight_packed` is a stream of bits that starts at the lowest bit of word 0: value i is in bits
b · i … b · i + b - 1. At 3 bits, values 10 and 21 of every 32 cross from one word into the next. (Before 0.18 a word
held ten whole values. At 2, 4 and 8 bits nothing has changed.) Rows are padded to whole words. Zero points are such
streams along out, one column for each group; a symmetric grid has none.

The library counts from -2^(b-1) and adds 2^(b-1) before it packs, so it stores q and z as grid.py defines them.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid, GroupParameters

WORD_BITS = 32
VALUES = 32
"""A stream of any width is at the start of a word again after this many values, which fill b words."""
PACKED_ELEMENTS = 2**20
"""Weights that are packed at a time: 4 MiB for each of two int32 temporaries."""


class PackQuantizedWeight(NamedTuple):
    """The tensors of a linear in a pack-quantized checkpoint."""

    weight_packed: Tensor  # (out, ⌈in · b / 32⌉) int32
    weight_scale: Tensor  # (out, n)
    weight_zero_point: Tensor | None  # (⌈out · b / 32⌉, n) int32; None on a symmetric grid
    weight_shape: Tensor  # (2,) int64: out, in


def words_for(values: int, bits: int) -> int:
    """Words in a stream, the last one padded."""
    return -(-values * bits // WORD_BITS)


def pack_stream(
    codes: Tensor,  # (rows, columns), integers 0 … 2^bits - 1 in any dtype
    bits: int,
) -> Tensor:
    """Packs every row into a stream of bits: (rows, ⌈columns · bits / 32⌉) int32, contiguous."""
    rows, columns = codes.shape
    blocks = -(-columns // VALUES)
    values = torch.zeros(rows, blocks * VALUES, dtype=torch.int32, device=codes.device)
    values[:, :columns] = codes
    values = values.unflatten(1, (blocks, VALUES))
    words = torch.zeros(rows, blocks, bits, dtype=torch.int32, device=codes.device)
    for i in range(VALUES):
        word, shift = divmod(i * bits, WORD_BITS)
        words[..., word] |= values[..., i] << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= values[..., i] >> (WORD_BITS - shift)
    return words.flatten(1)[:, : words_for(columns, bits)].contiguous()


def unpack_stream(
    words: Tensor,  # (rows, ⌈columns · bits / 32⌉) int32
    columns: int,
    bits: int,
) -> Tensor:
    """Inverse of `pack_stream`: (rows, columns) uint8; at 8 bits it may be a view of `words`."""
    mask = 2**bits - 1
    if sys.byteorder == "big":
        words = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4)).flip(-1).flatten(1).view(torch.int32)
    words = words.contiguous()
    if words.stride(-1) != 1:  # one word in a row: contiguous at any stride, but no bytes can be viewed in it
        words = words.clone(memory_format=torch.contiguous_format)
    stream = words.view(torch.uint8)
    if 8 % bits == 0:
        parts = [stream >> shift & mask for shift in range(0, 8, bits)] if bits < 8 else [stream]
    else:  # eight values fill `bits` bytes
        blocks = -(-columns // 8)
        spare = blocks * bits - stream.shape[1]
        stream = torch.nn.functional.pad(stream, (0, spare)) if spare > 0 else stream[:, : blocks * bits]
        eights = stream.unflatten(1, (blocks, bits)).to(torch.int32 if bits < 4 else torch.int64)
        value = eights[..., 0].clone()
        for byte in range(1, bits):
            value |= eights[..., byte] << (8 * byte)
        parts = [(value >> (bits * i) & mask).to(torch.uint8) for i in range(8)]
    codes = parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1).flatten(1)
    return codes[:, :columns]


def pack_weight(
    codes: Tensor,  # (out, in) integers on the grid
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
    scale_dtype: torch.dtype,
) -> PackQuantizedWeight:
    """Packs one linear; the tensors are contiguous. Temporaries are those of PACKED_ELEMENTS weights."""
    zeros = pack_stream(parameters.zero.t(), grid.bits).t().contiguous() if grid.zero_point else None
    return PackQuantizedWeight(
        torch.cat([pack_stream(rows, grid.bits) for rows in codes.split(max(1, PACKED_ELEMENTS // codes.shape[1]))]),
        parameters.scale.to(scale_dtype).contiguous(),
        zeros,
        torch.tensor(codes.shape, dtype=torch.int64, device=codes.device),
    )


def unpack_zeros(
    weight_zero_point: Tensor | None,  # (⌈out · bits / 32⌉, n) int32
    out_features: int,
    bits: int,
) -> Tensor | None:
    """Unpacks zero points: (out, n) uint8, or None on a symmetric grid, where each is 2^(bits - 1)."""
    return None if weight_zero_point is None else unpack_stream(weight_zero_point.t(), out_features, bits).t()


def dequantize_rows(
    packed: Tensor,  # (rows, ⌈in · bits / 32⌉) int32: rows of weight_packed
    scale: Tensor,  # (rows, n)
    zeros: Tensor | None,  # (rows, n) uint8
    in_features: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantizes rows of a weight: (rows, in); (q - z) · Δ is computed in fp32 (fp64 for fp64) and rounded once."""
    working = torch.promote_types(dtype, torch.float32)
    codes = unpack_stream(packed, in_features, bits).to(working).unflatten(1, (scale.shape[1], -1))
    middle = 2 ** (bits - 1)
    codes.sub_(middle if zeros is None else zeros.unsqueeze(-1).to(working))
    return codes.mul_(scale.unsqueeze(-1).to(working)).flatten(1).to(dtype)
