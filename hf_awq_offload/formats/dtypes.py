"""The dtypes of safetensors files: as the format spells them, as torch has them (huggingface.co/docs/safetensors)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
PAIRS = "F4"
"""The dtype of which a byte holds two values; headers count values, torch counts bytes."""


def shape_in_torch(spelling: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the torch tensor that holds a stored tensor of this shape.

    Raises:
        ValueError: the values of a row fill no whole bytes.
    """
    if spelling != PAIRS:
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise ValueError(f"a tensor of {PAIRS} has the shape {list(shape)}")
    return (*shape[:-1], shape[-1] // 2)


def size_bytes(spelling: str, shape: Sequence[int]) -> int:
    """Returns how many bytes a stored tensor takes; ValueError as in `shape_in_torch`."""
    return math.prod(shape_in_torch(spelling, shape)) * DTYPES[spelling].itemsize
