"""Computes the loss of replacing a weight from input statistics alone. Pure functions.

    ‖X (Ŵ - W)ᵀ‖² / tokens = tr(D G Dᵀ),   D = Ŵ - W,   G = XᵀX / tokens

Because G is symmetric, the diagonal of D G Dᵀ is Σ_b (2 · D_{>b} G_{>b,b} + D_b G_bb) · D_b over blocks of columns b,
which needs little more than half of the products. An accelerator takes few large blocks, of which each is few kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.grid import Grid
from . import gram_matrix
from .gram_matrix import Gram, GramInRam

BLOCK_CHANNELS = 512
LEAST_ACCELERATOR_BLOCK_CHANNELS, MOST_ACCELERATOR_BLOCKS = 1024, 4
"""Four blocks need 5/8 of all products, eight need 9/16 in twice the kernels."""


class RowSample(NamedTuple):
    """A sample of a weight's rows that represents all of them."""

    rows: Tensor  # (rows, in) fp32
    grid: Grid
    share: Tensor  # (rows,) weight of each row's error in the total

    def part(self, span: slice) -> RowSample:
        """Returns a sample of some of the rows."""
        return RowSample(self.rows[span], self.grid, self.share[span])


def row_mse(
    difference: Tensor,  # (rows, in) Ŵ - W
    gram: Gram,  # symmetric
) -> Tensor:
    """Returns the diagonal of D G Dᵀ, the squared output error per token of every output channel, (rows,)."""
    total = torch.zeros(difference.shape[0], dtype=difference.dtype, device=difference.device)
    width = block_channels(gram)
    for start in range(0, gram.shape[0], width):
        stop = min(start + width, gram.shape[0])
        block = difference[:, start:stop]
        own, others = _columns(gram, slice(start, stop))
        products = block @ own
        if stop < gram.shape[0]:
            products.addmm_(difference[:, stop:], others, alpha=2)
        total += products.mul_(block).sum(dim=1)
    return total


def _columns(gram: Gram, block: slice) -> tuple[Tensor, Tensor]:
    """Returns the columns of a block of channels: its own rows of them, and those after it."""
    if isinstance(gram, GramInRam):
        rows = gram.rows(block, block.start)  # as columns, since the matrix is symmetric
        width = block.stop - block.start
        return rows[:, :width].t(), rows[:, width:].t()
    return gram[block, block], gram[block.stop :, block]


def block_channels(gram: Gram) -> int:
    """Returns how many channels `row_mse` multiplies at a time."""
    if isinstance(gram, GramInRam):
        return gram_matrix.BLOCK_CHANNELS
    if gram.device.type == "cpu":
        return BLOCK_CHANNELS
    return max(LEAST_ACCELERATOR_BLOCK_CHANNELS, -(-gram.shape[0] // MOST_ACCELERATOR_BLOCKS))
