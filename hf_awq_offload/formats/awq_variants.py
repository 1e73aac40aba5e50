"""AWQ formats other than GEMM: converts each to GEMM, and GEMM to GEMV. Pure functions.

    gemv                 a word holds eight input channels, the first in the lowest bits
    gemv_fast, llm-awq   input and output channels are interleaved (`_unpack_fast`); a zero point is stored as -z · Δ

layouts.py has the shapes. n is the number of groups in a row, p that number padded so that a kernel reads whole
vectors; nothing uses the padding. Sources: AutoAWQ 0.2.9 `WQLinear_GEMV.from_linear` and
`WQLinear_GEMVFast.from_linear` with `pack_intweight`; llm-awq `qmodule.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CheckpointError
from .awq import BITS, COLUMNS_PER_WORD, PackedWeight, pack_columns, unpack_columns

FAST_ROWS = 4  # output channels interleaved in one int16
FAST_COLUMNS = 64  # input channels over which they are interleaved


def to_gemm(
    version: str,  # one of AWQ_FORMATS
    stored: PackedWeight,  # in the format `version`
    n: int,  # groups in a row
) -> PackedWeight:
    """Converts a weight to GEMM."""
    return _CONVERSIONS[version](stored, n)


def _from_gemv(stored: PackedWeight, n: int) -> PackedWeight:
    codes, zeros = (_unpack_ascending(words) for words in stored[:2])  # (out, in), (out, 8 · p / 8)
    scales = stored.scales[:, :n].t().contiguous()
    return PackedWeight(pack_columns(codes.t()), pack_columns(zeros[:, :n].t()), scales)


def _from_gemv_fast(stored: PackedWeight, n: int) -> PackedWeight:
    scales = stored.scales[:n].contiguous()
    steps = scales.float()
    zeros = torch.where(steps == 0, 0, -stored.qzeros[:n].float() / steps).round().clamp_(0, 15)
    return PackedWeight(pack_columns(_unpack_fast(stored.qweight).t()), pack_columns(zeros), scales)


def to_gemv(
    packed: PackedWeight,  # in GEMM
) -> PackedWeight:
    """Converts a weight to GEMV, with the padding that AutoAWQ's kernel reads.

    Raises:
        CheckpointError: AutoAWQ's GEMV does not have the group size.
    """
    in_features, n = packed.qweight.shape[0], packed.qzeros.shape[0]
    padded = COLUMNS_PER_WORD * gemv_words(in_features, in_features // n)
    zeros = unpack_columns(packed.qzeros).t()  # (out, n)
    padding = (0, padded - n)
    return PackedWeight(
        _pack_ascending(unpack_columns(packed.qweight).t()),
        _pack_ascending(torch.nn.functional.pad(zeros, padding)),
        torch.nn.functional.pad(packed.scales.t(), padding).contiguous(),
    )


def gemv_words(
    in_features: int,
    group_size: int,  # resolved
) -> int:
    """Words in a row of GEMV's `qzeros`, padding included (AutoAWQ 0.2.9 `calculate_zeros_width`).

    Raises:
        CheckpointError: AutoAWQ's GEMV does not have the group size.
    """
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    if group_size not in (32, 64) and group_size < 128:
        raise CheckpointError(
            f"The group size is {group_size}; AutoAWQ's GEMV layout supports 32, 64, and 128 or more. Convert to "
            "compressed-tensors, or leave the checkpoint in GEMM."
        )
    words = -(-(in_features // group_size) // COLUMNS_PER_WORD)
    return -(-words // multiple) * multiple


_CONVERSIONS: dict[str, Callable[[PackedWeight, int], PackedWeight]] = {
    "gemm": lambda stored, n: stored,
    "gemv": _from_gemv,
    "gemv_fast": _from_gemv_fast,
    "llm-awq": _from_gemv_fast,
}


def _unpack_ascending(
    words: Tensor,  # (rows, columns / 8) int32
) -> Tensor:
    """(rows, columns) uint8: column 8c + i is in bits 4i … 4i + 3 of word c."""
    shifts = torch.arange(COLUMNS_PER_WORD, dtype=torch.int32, device=words.device) * BITS
    return ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8).flatten(-2)


def _pack_ascending(
    codes: Tensor,  # (rows, columns) uint8, columns % 8 == 0
) -> Tensor:
    """Inverse of `_unpack_ascending`, (rows, columns / 8) int32, contiguous."""
    values = codes.to(torch.int32).unflatten(-1, (-1, COLUMNS_PER_WORD))
    words = torch.zeros(values.shape[:-1], dtype=torch.int32, device=codes.device)
    for position in range(COLUMNS_PER_WORD):
        words |= values[..., position] << (BITS * position)
    return words


def _unpack_fast(
    words: Tensor,  # (out / 4, in) int16
) -> Tensor:
    """(out, in) uint8.

    A block of 64 input channels and 4 output channels r fills 64 int16 of 4 values each: value v of int16 c is entry
    4c + v of the 256 values (r, 64). Two permutations order every 32 input channels:

        first  0 1 8 9 16 17 24 25  2 3 10 11 …        (4, 4, 2) -> transposed to (4 of dim 1, 4 of dim 0, 2)
        then, in each eight, even positions before odd ones: 0 2 4 6 1 3 5 7
    """
    rows, in_features = words.shape
    shifts = torch.arange(4, dtype=torch.int16, device=words.device) * BITS
    values = ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)  # (out / 4, in, 4)
    blocks = values.reshape(rows, in_features // FAST_COLUMNS, FAST_ROWS, FAST_COLUMNS)
    interleaved = blocks.transpose(1, 2).reshape(rows * FAST_ROWS, in_features // 32, 4, 2, 4)
    pairs = interleaved.transpose(-1, -2)  # (…, 4, 4, 2): even and odd positions side by side again
    return pairs.transpose(2, 3).reshape(rows * FAST_ROWS, in_features)
