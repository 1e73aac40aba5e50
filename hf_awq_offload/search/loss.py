"""The loss of a replaced weight, from statistics alone. Pure functions.

    ‖X (Ŵ - W)ᵀ‖² / tokens = tr(D G Dᵀ),   D = Ŵ - W,   G = XᵀX / tokens

G is symmetric: with blocks of columns b, D G Dᵀ has the diagonal Σ_b (2 · D_{>b} G_{>b,b} + D_b G_bb) · D_b, which
takes little more than half of the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.grid import Grid

CACHED_ELEMENTS = 2**19
"""Weights worked on at a time on a CPU: temporaries of 2 MiB stay in its cache (3.4 times faster, docs/log.md)."""
CACHED_ROWS = 256
"""But at least so many rows: fewer would read a gram matrix for too few products."""
ACCELERATOR_ELEMENTS = 2**24
"""The same on an accelerator, where fewer, larger kernels count: 64 MiB for each temporary."""
BLOCK_CHANNELS = 512


class RowSample(NamedTuple):
    """Rows of a weight that stand for all of them."""

    rows: Tensor  # (rows, in) fp32
    grid: Grid
    share: Tensor  # (rows,) what the error of a row counts for


def row_chunks(
    weight: Tensor,  # (out, in)
) -> Iterator[slice]:
    """Spans of rows that work on `weight` is cut into, so that temporaries stay small."""
    if weight.device.type == "cpu":
        rows = max(CACHED_ROWS, CACHED_ELEMENTS // weight.shape[1])
    else:
        rows = max(1, ACCELERATOR_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def row_mse(
    difference: Tensor,  # (rows, in) Ŵ - W
    gram: Tensor,  # (in, in), symmetric
) -> Tensor:
    """The diagonal of D G Dᵀ: squared output error per token of every output channel, (rows,)."""
    total = torch.zeros(difference.shape[0], dtype=difference.dtype, device=difference.device)
    for start in range(0, gram.shape[0], BLOCK_CHANNELS):
        stop = min(start + BLOCK_CHANNELS, gram.shape[0])
        block = difference[:, start:stop]
        products = block @ gram[start:stop, start:stop]
        if stop < gram.shape[0]:
            products.addmm_(difference[:, stop:], gram[stop:, start:stop], alpha=2)
        total += products.mul_(block).sum(dim=1)
    return total
