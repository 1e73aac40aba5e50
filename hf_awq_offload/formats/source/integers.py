"""Packed integers on a grid of groups, dequantized some rows at a time: w = (q - z) · Δ in fp32, rounded once.

q and z have at most 8 bits and Δ is fp16 or bf16 where it isn't fp32, so the product of the first two is exact, and a
library that computes in the dtype of Δ gets the same bits. Few rows are unpacked at a time: an unpacked integer takes
several bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .records import contradicts

VALUES_AT_A_TIME = 1 << 22


def dequantize_rows_in_chunks(
    codes: Callable[[int, int], Tensor],  # (first, last) -> (last - first, in) integers, uint8
    shape: tuple[int, int],  # (out, in)
    scale: Tensor,  # (out, n)
    zeros: Tensor | int,  # (out, n) uint8, or the zero point of all
    groups: Tensor | None,  # (in,) int64: the group of each input channel; None: in order, all of one size
    dtype: torch.dtype,
) -> Tensor:
    """The dequantized weight, (out, in)."""
    rows, columns = shape
    weight = torch.empty(shape, dtype=dtype)
    step = max(1, VALUES_AT_A_TIME // columns)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        values = codes(first, last).to(torch.float32)
        factors = scale[first:last].to(torch.float32)
        offsets = zeros if isinstance(zeros, int) else zeros[first:last].to(torch.float32)
        if groups is None:
            grouped = values.unflatten(1, (scale.shape[1], -1))
            grouped.sub_(offsets if isinstance(offsets, int) else offsets.unsqueeze(-1))
            grouped.mul_(factors.unsqueeze(-1))
        else:
            values.sub_(offsets if isinstance(offsets, int) else offsets[:, groups])
            values.mul_(factors[:, groups])
        weight[first:last] = values
    return weight


def groups_of(
    g_idx: Tensor,  # (in,) integers
    n: int,  # groups in a row
    name: str,  # for messages
) -> Tensor | None:
    """The group of each input channel, (in,) int64, or None if they are in order and of one size.

    Raises:
        CheckpointError: there is no such group.
    """
    groups = g_idx.to(torch.int64)
    if int(groups.min()) < 0 or int(groups.max()) >= n:
        contradicts(f"{name} names the groups {int(groups.min())} … {int(groups.max())}", f"0 … {n - 1}")
    in_features = groups.numel()
    if in_features % n == 0 and torch.equal(groups, torch.arange(in_features) // (in_features // n)):
        return None
    return groups
