"""Searches for a clipping range per group (AutoAWQ's `auto_clip`, Lin et al. 2023, on the gram matrix).

Shrinking a group's range makes its grid finer but saturates its largest weights. For every (row, group) the search
picks the candidate c = max|w| · (1 - i/20), i = 0 … 9, with the least error. The error of a group on its own is
dᵀ G_gg d, where G_gg is the (group × group) diagonal block of the gram matrix. The errors of all other groups are taken
to be zero, so groups are independent and no activations are needed. The errors of a row's groups can still add up, so
`rounding.round_weight` keeps the clipped ranges of a row only where they lower its error on the full gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.grid import Grid, GroupRange, group_range, quantize_dequantize
from .chunks import row_chunks
from .gram_matrix import Gram, GramInRam

STEPS = 10
STEP = 1 / 20
COARSE_STEP = 2


def search_clip(
    weight: Tensor,  # (out, in), scales applied
    gram: Gram,  # of the scaled input
    grid: Grid,
) -> GroupRange:
    """Returns the best range of every group, (out, n) each."""
    blocks = gram_blocks(gram, grid)
    chunks = [_search_rows(weight[span].float(), blocks, grid) for span in row_chunks(weight)]
    return GroupRange(torch.cat([chunk.low for chunk in chunks]), torch.cat([chunk.high for chunk in chunks]))


def gram_blocks(
    gram: Gram,
    grid: Grid,
) -> Tensor:
    """Returns the diagonal blocks of the gram matrix, (n, group_size, group_size)."""
    if isinstance(gram, GramInRam):
        return gram.diagonal_blocks(grid.group_size)
    n = gram.shape[0] // grid.group_size
    index = torch.arange(n, device=gram.device)
    return gram.unflatten(0, (n, -1)).unflatten(2, (n, -1))[index, :, index]


def group_mse(
    difference: Tensor,  # (rows, in)
    blocks: Tensor,  # (n, group_size, group_size)
    grid: Grid,
) -> Tensor:
    """Returns dᵀ G_gg d for every group, (rows, n)."""
    groups = grid.groups(difference).transpose(0, 1)  # (n, rows, group_size)
    return (groups @ blocks).mul_(groups).sum(dim=-1).t()


def _search_rows(
    rows: Tensor,  # (rows, in) fp32
    blocks: Tensor,  # (n, group_size, group_size)
    grid: Grid,
) -> GroupRange:
    """Tries every second step, then the two next to the best of these; in most groups the error has one minimum."""
    full = group_range(rows, grid)
    best_step = torch.zeros_like(full.low)
    best_error = group_mse(quantize_dequantize(rows, grid, full).sub_(rows), blocks, grid)
    for coarse in range(COARSE_STEP, STEPS, COARSE_STEP):
        best_step, best_error = _better(
            rows, blocks, grid, full, torch.full_like(best_step, coarse), best_step, best_error
        )
    inward = torch.where(best_step == STEPS - 1, -1.0, 1.0)  # at either end, both neighbours lie on the same side
    outward = torch.where(best_step == 0, 2.0, torch.where(best_step == STEPS - 1, -2.0, -1.0))
    center = best_step
    for offset in (inward, outward):
        best_step, best_error = _better(rows, blocks, grid, full, center + offset, best_step, best_error)
    return clipped_range(full, best_step)


def clipped_range(
    full: GroupRange,  # (rows, n)
    step: Tensor,  # (rows, n)
) -> GroupRange:
    bound = torch.maximum(-full.low, full.high) * (1 - step * STEP)
    return GroupRange(full.low.maximum(-bound), full.high.minimum(bound))


def _better(
    rows: Tensor,  # (rows, in)
    blocks: Tensor,
    grid: Grid,
    full: GroupRange,
    step: Tensor,  # (rows, n) the candidate
    best_step: Tensor,
    best_error: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the better of `step` and `best_step` for every group, and its error."""
    error = group_mse(quantize_dequantize(rows, grid, clipped_range(full, step)).sub_(rows), blocks, grid)
    better = error < best_error
    return torch.where(better, step, best_step), torch.where(better, error, best_error)
