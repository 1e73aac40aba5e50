"""Converts a 4-bit linear between AWQ GEMM and pack-quantized, exactly. Pure functions.

    AWQ GEMM         a word holds eight output channels in AWQ's order         awq.py
    pack-quantized   a word holds eight input channels in ascending order      pack_quantized.py

Both store integers and zero points counted from 0; only the order of the bits changes.
"""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from .awq import BITS, COLUMNS_PER_WORD, PackedWeight, pack_columns, unpack_columns
from .grid import SCALE_DTYPE
from .pack_quantized import PackQuantizedWeight, pack_stream, unpack_stream, unpack_zeros

SYMMETRIC_ZERO = 2 ** (BITS - 1)


def to_pack_quantized(
    packed: PackedWeight,
    zero_point: bool,  # whether the checkpoint's grid has zero points
    scale_dtype: torch.dtype,
) -> PackQuantizedWeight:
    """Converts a linear from AWQ GEMM to pack-quantized.

    Raises:
        CheckpointError: the scales are not exact in `scale_dtype`, or a symmetric grid has a zero point other than 8.
    """
    codes = unpack_columns(packed.qweight).t()  # (out, in)
    zeros = unpack_columns(packed.qzeros).t()  # (out, n)
    if not zero_point and not bool((zeros == SYMMETRIC_ZERO).all()):
        raise CheckpointError(
            f"The checkpoint says zero_point=false, but has zero points other than {SYMMETRIC_ZERO}. Set "
            "zero_point=true in its config.json."
        )
    return PackQuantizedWeight(
        pack_stream(codes, BITS),
        exact(packed.scales.t().contiguous(), scale_dtype),
        pack_stream(zeros.t(), BITS).t().contiguous() if zero_point else None,
        torch.tensor(codes.shape, dtype=torch.int64, device=codes.device),
    )


def to_awq(
    packed: PackQuantizedWeight,
) -> PackedWeight:
    """Converts a 4-bit linear from pack-quantized to AWQ GEMM; on a symmetric grid every zero point becomes 8.

    Raises:
        CheckpointError: AWQ can't hold the shape, or fp16 can't hold the scales exactly.
    """
    out_features, in_features = (int(size) for size in packed.weight_shape)
    if out_features % COLUMNS_PER_WORD:
        raise CheckpointError(
            f"The linear has {out_features} output channels; the AWQ layout holds multiples of {COLUMNS_PER_WORD}. "
            "Leave it in compressed-tensors, or in full precision."
        )
    codes = unpack_stream(packed.weight_packed, in_features, BITS)
    zeros = unpack_zeros(packed.weight_zero_point, out_features, BITS)
    if zeros is None:
        zeros = torch.full_like(packed.weight_scale, SYMMETRIC_ZERO, dtype=torch.uint8)
    scales = exact(packed.weight_scale.t().contiguous(), SCALE_DTYPE)
    return PackedWeight(pack_columns(codes.t()), pack_columns(zeros.t()), scales)


def exact(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Casts scales to `dtype`; raises CheckpointError if that changes one."""
    converted = scales.to(dtype)
    changed = int((converted.to(scales.dtype) != scales).sum())
    if changed:
        raise CheckpointError(
            f"{changed} of {scales.numel()} scales are not exact in {str(dtype).removeprefix('torch.')} (stored in "
            f"{str(scales.dtype).removeprefix('torch.')}), so the weights would change. Expected scales that are exact "
            "in both, as this package writes them; quantize the original again."
        )
    return converted
