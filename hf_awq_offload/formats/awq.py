"""How the AWQ GEMM format packs 4-bit integers into int32 words. Pure functions.

Format: llm-awq / AutoAWQ `WQLinear_GEMM`, read by vLLM, SGLang, TGI and transformers; shapes in layouts.py.

Word c of a row holds the eight output columns 8c … 8c+7, four bits each, in an order that suits CUDA kernels which
unpack two halves at once. Position in the word (bits 4i … 4i+3) → column:

    i      0 1 2 3 4 5 6 7
    column 0 2 4 6 1 3 5 7

Weights are stored transposed, (in, out). Zero points are stored unchanged (GPTQ's v1 stores them minus one).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import SCALE_DTYPE, GroupParameters

BITS = 4
COLUMNS_PER_WORD = 32 // BITS
COLUMN_AT_POSITION = (0, 2, 4, 6, 1, 3, 5, 7)
PACKED_ELEMENTS = 2**22
"""Weights that are packed at a time: 16 MiB for an int32 temporary."""
_POSITION_OF_COLUMN = tuple(COLUMN_AT_POSITION.index(column) for column in range(COLUMNS_PER_WORD))


class PackedWeight(NamedTuple):
    """The three tensors of a linear in an AWQ GEMM checkpoint."""

    qweight: Tensor  # (in, out / 8) int32
    qzeros: Tensor  # (n, out / 8) int32
    scales: Tensor  # (n, out) fp16


def pack_columns(
    codes: Tensor,  # (rows, columns), integers 0 … 15 in any dtype, columns % 8 == 0
) -> Tensor:
    """Packs eight columns into each int32 word: (rows, columns / 8)."""
    eights = codes.unflatten(-1, (-1, COLUMNS_PER_WORD))
    words = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=codes.device)
    for position, column in enumerate(COLUMN_AT_POSITION):
        words |= eights[..., column].to(torch.int32) << (BITS * position)
    return words


def unpack_columns(
    words: Tensor,  # (rows, columns / 8) int32
) -> Tensor:
    """Inverse of `pack_columns`: (rows, columns) uint8, values 0 … 15."""
    shifts = torch.tensor(_POSITION_OF_COLUMN, dtype=torch.int32, device=words.device) * BITS
    # `>>` on int32 fills with the sign bit from the left; the mask clears it.
    return ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8).flatten(-2)


def pack_weight(
    codes: Tensor,  # (out, in) integers 0 … 15
    parameters: GroupParameters,  # (out, n)
) -> PackedWeight:
    """Packs one linear; the tensors are contiguous. Temporaries are those of PACKED_ELEMENTS weights."""
    out_features, in_features = codes.shape
    qweight = torch.empty(in_features, out_features // COLUMNS_PER_WORD, dtype=torch.int32, device=codes.device)
    columns = max(1, PACKED_ELEMENTS // in_features // COLUMNS_PER_WORD) * COLUMNS_PER_WORD
    for first in range(0, out_features, columns):
        last = min(first + columns, out_features)
        words = slice(first // COLUMNS_PER_WORD, last // COLUMNS_PER_WORD)
        qweight[:, words] = pack_columns(codes[first:last].t())
    return PackedWeight(
        qweight,
        pack_columns(parameters.zero.t()),
        parameters.scale.t().to(SCALE_DTYPE).contiguous(),
    )


def unpack_weight(
    packed: PackedWeight,
    dtype: torch.dtype,
) -> Tensor:
    """The dequantized weight, (out, in) in `dtype`; (q - z) · Δ is computed in fp32 and rounded once."""
    codes = unpack_columns(packed.qweight).to(torch.float32)
    zeros = unpack_columns(packed.qzeros).to(torch.float32)
    groups = codes.unflatten(0, (packed.scales.shape[0], -1))  # (n, group_size, out)
    groups = groups.sub_(zeros.unsqueeze(1)).mul_(packed.scales.to(torch.float32).unsqueeze(1))
    return groups.flatten(0, 1).t().to(dtype)
