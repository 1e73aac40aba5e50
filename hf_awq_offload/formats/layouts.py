"""The tensors of one linear in each checkpoint format: names, shapes and dtypes, stated here only. Pure functions.

    format              tensor              shape                   dtype
    gemm                qweight             (in, out / 8)           int32
                        qzeros              (n, out / 8)            int32
                        scales              (n, out)                fp16
    gemv                qweight             (out, in / 8)           int32
                        qzeros              (out, ⌈p / 8⌉)          int32
                        scales              (out, p)                fp16
    gemv_fast, llm-awq  qweight             (out / 4, in)           int16
                        qzeros              (p, out)                fp16
                        scales              (p, out)                fp16
    compressed-tensors  weight_packed       (out, ⌈in · b / 32⌉)    int32
                        weight_scale        (out, n)                the model's
                        weight_zero_point   (⌈out · b / 32⌉, n)     int32, absent on a symmetric grid
                        weight_shape        (2,)                    int64, holds out, in

b is the number of bits, n = in / group_size the number of groups in a row, and p ≥ n that number with the padding that
kernels read and nothing uses. In every format a bias is an ordinary tensor `bias` (out,).

Sources: AutoAWQ 0.2.9 `WQLinear_GEMM`, `WQLinear_GEMV` and `WQLinear_GEMVFast`; llm-awq `qmodule.py`;
compressed-tensors 0.18 `PackedQuantizationCompressor`, which calls its format pack-quantized. awq.py, awq_variants.py
and pack_quantized.py say how the integers lie in the words.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import torch

from .awq import BITS, COLUMNS_PER_WORD, PackedWeight
from .awq_variants import FAST_ROWS
from .grid import SCALE_DTYPE, Grid
from .pack_quantized import PackQuantizedWeight, words_for

GEMM, GEMV = "gemm", "gemv"
AWQ_FORMATS = (GEMM, GEMV, "gemv_fast", "llm-awq")
COMPRESSED_TENSORS = "compressed-tensors"

SPELLINGS = {"qzeros": ("qzeros", "scaled_zeros")}
"""Names that checkpoints use for a tensor, where there are several; llm-awq uses both."""


class TensorLayout(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    padded: int | None = None
    """The dimension that may be larger than `shape` says; kernels read the padding, nothing uses it."""


class TensorNames(NamedTuple):
    """Names of the tensors of one linear."""

    all: tuple[str, ...]  # every tensor that a linear may have, its bias aside
    integers: str
    scales: str


AWQ_NAMES = TensorNames(PackedWeight._fields, "qweight", "scales")
PACK_QUANTIZED_NAMES = TensorNames(PackQuantizedWeight._fields, "weight_packed", "weight_scale")


def names_in(
    format: str,  # one of AWQ_FORMATS, or COMPRESSED_TENSORS
) -> TensorNames:
    """Names of the tensors of a linear in a format."""
    return PACK_QUANTIZED_NAMES if format == COMPRESSED_TENSORS else AWQ_NAMES


def tensors_of(
    format: str,  # one of AWQ_FORMATS, or COMPRESSED_TENSORS
    in_features: int,  # a multiple of the group size
    out_features: int,  # in AWQ formats a multiple of 8
    grid: Grid,  # in AWQ formats of 4 bits
    dtype: torch.dtype = SCALE_DTYPE,  # of the scales in compressed-tensors; AWQ stores fp16
    padded_groups: int | None = None,  # p; by default there is no padding
) -> dict[str, TensorLayout]:
    """Name -> layout of every tensor that a linear has in a format, its bias aside."""
    n = in_features // grid.group_size
    p = padded_groups or n
    if format == GEMM:
        return {
            "qweight": TensorLayout((in_features, out_features // COLUMNS_PER_WORD), torch.int32),
            "qzeros": TensorLayout((n, out_features // COLUMNS_PER_WORD), torch.int32),
            "scales": TensorLayout((n, out_features), SCALE_DTYPE),
        }
    if format == GEMV:
        return {
            "qweight": TensorLayout((out_features, in_features // COLUMNS_PER_WORD), torch.int32),
            "qzeros": TensorLayout((out_features, words_for(p, BITS)), torch.int32, padded=1),
            "scales": TensorLayout((out_features, p), SCALE_DTYPE, padded=1),
        }
    if format in AWQ_FORMATS:  # gemv_fast, llm-awq
        return {
            "qweight": TensorLayout((out_features // FAST_ROWS, in_features), torch.int16),
            "qzeros": TensorLayout((p, out_features), SCALE_DTYPE, padded=0),
            "scales": TensorLayout((p, out_features), SCALE_DTYPE, padded=0),
        }
    tensors = {
        "weight_packed": TensorLayout((out_features, words_for(in_features, grid.bits)), torch.int32),
        "weight_scale": TensorLayout((out_features, n), dtype),
        "weight_zero_point": TensorLayout((words_for(out_features, grid.bits), n), torch.int32),
        "weight_shape": TensorLayout((2,), torch.int64),
    }
    if not grid.zero_point:
        del tensors["weight_zero_point"]
    return tensors


def features_of(
    format: str,  # one of AWQ_FORMATS
    qweight_shape: tuple[int, int],
) -> tuple[int, int]:
    """(in_features, out_features) of a linear, from the shape of its integers: the inverse of `tensors_of`."""
    rows, columns = qweight_shape
    if format == GEMM:
        return rows, columns * COLUMNS_PER_WORD
    return (columns * COLUMNS_PER_WORD, rows) if format == GEMV else (columns, rows * FAST_ROWS)


def spellings_of(
    name: str,  # of a tensor, as `tensors_of` has it
) -> tuple[str, ...]:
    """The names that checkpoints use for a tensor."""
    return SPELLINGS.get(name, (name,))


def find_tensors(
    format: str,  # one of AWQ_FORMATS, or COMPRESSED_TENSORS
    available: Container[str],
    prefix: str = "",  # a linear's name in the checkpoint, and a dot
) -> dict[str, str]:
    """Name as `tensors_of` has it -> name in `available`, for each tensor of a linear that is there."""
    stored_names = {}
    for name in names_in(format).all:
        stored = next((prefix + spelling for spelling in spellings_of(name) if prefix + spelling in available), None)
        if stored is not None:
            stored_names[name] = stored
    return stored_names
