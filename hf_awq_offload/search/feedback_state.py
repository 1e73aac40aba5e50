"""What rounding with error feedback reads and writes, leaf after leaf (formulas: `rounding.py`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeedbackState(NamedTuple):
    """Tensors of one weight; channels are in the order in which they are rounded."""

    remaining: Tensor  # (in, out) fp32, contiguous: w', codes once rounded
    errors: Tensor  # (in, out) fp32, contiguous: w, w - ŵ once rounded
    squares: Tensor  # (out,) fp32: Σ c² (w' - ŵ)² so far
    scale: Tensor  # (n, out) fp32, contiguous
    zero: Tensor  # (n, out) fp32, contiguous
    group_of_channel: Tensor  # (in,) int64
    coupling: Tensor  # (in, in) fp32, contiguous: I + N
    pivots: Tensor  # (in,) fp32: c²
