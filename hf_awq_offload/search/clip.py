"""Search for a clipping range per group (AutoAWQ's `auto_clip`, Lin et al. 2023, on the gram matrix).

Shrinking a group's range makes its grid finer and saturates its largest weights. For every (row, group) the candidate
c = max|w| · (1 - i/20), i = 0 … 9, with the least error is taken. The error of a group alone is dᵀ G_gg d, with
G_gg the (group × group) diagonal block of the gram matrix: what other groups do is held at zero, so that groups are
independent and no activation is needed. Errors of a row's groups can still add up, so a row keeps its clipped ranges
only where they lower its error on the full gram matrix: the result is never worse than no clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import Grid, GroupRange, group_range, quantize_dequantize
from .scale import fp32_chunks, row_mse

STEPS = 10
STEP = 1 / 20


def search_clip(
    weight: Tensor,  # (out, in), scales applied
    gram: Tensor,  # (in, in) fp32, of the scaled input
    grid: Grid,
) -> GroupRange:
    """The best range of every group, (out, n) each."""
    blocks = gram_blocks(gram, grid)
    chunks = [_keep_if_better(rows, _search_rows(rows, blocks, grid), gram, grid) for rows in fp32_chunks([weight])]
    return GroupRange(torch.cat([chunk.low for chunk in chunks]), torch.cat([chunk.high for chunk in chunks]))


def gram_blocks(
    gram: Tensor,  # (in, in)
    grid: Grid,
) -> Tensor:
    """The diagonal blocks, (n, group_size, group_size)."""
    n = gram.shape[0] // grid.group_size
    index = torch.arange(n, device=gram.device)
    return gram.unflatten(0, (n, -1)).unflatten(2, (n, -1))[index, :, index]


def group_mse(
    difference: Tensor,  # (rows, in)
    blocks: Tensor,  # (n, group_size, group_size)
    grid: Grid,
) -> Tensor:
    """dᵀ G_gg d of every group, (rows, n)."""
    groups = grid.groups(difference).transpose(0, 1)  # (n, rows, group_size)
    return (groups @ blocks).mul_(groups).sum(dim=-1).t()


def _search_rows(
    rows: Tensor,  # (rows, in) fp32
    blocks: Tensor,
    grid: Grid,
) -> GroupRange:
    full = group_range(rows, grid)
    largest = torch.maximum(-full.low, full.high)
    best, best_error = full, None
    for step in range(STEPS):
        bound = largest * (1 - step * STEP)
        candidate = GroupRange(full.low.maximum(-bound), full.high.minimum(bound))
        error = group_mse(quantize_dequantize(rows, grid, candidate).sub_(rows), blocks, grid)
        if best_error is None:
            best_error = error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = GroupRange(torch.where(better, candidate.low, best.low), torch.where(better, candidate.high, best.high))
    return best


def _keep_if_better(
    rows: Tensor,  # (rows, in) fp32
    clipped: GroupRange,
    gram: Tensor,  # (in, in)
    grid: Grid,
) -> GroupRange:
    """`clipped` for the rows whose error on the full gram matrix it lowers, the full range for the others."""
    full = group_range(rows, grid)
    better = row_mse(quantize_dequantize(rows, grid, clipped) - rows, gram) < row_mse(
        quantize_dequantize(rows, grid, full) - rows, gram
    )
    keep = better.unsqueeze(1)
    return GroupRange(torch.where(keep, clipped.low, full.low), torch.where(keep, clipped.high, full.high))
