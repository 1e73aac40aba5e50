"""Cuts the rows of several linears into blocks to work on one after another.

A CPU wants blocks that stay in its cache. An accelerator wants few: small weights with the same grid, such as those of
experts, go into one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..formats.grid import Grid
from .chunks import ACCELERATOR_ELEMENTS, at_once, row_chunks


def row_blocks(
    weights: Sequence[Tensor],  # (out_i, in) each, on one device
    grids: Sequence[Grid],  # one per weight
) -> Iterator[tuple[Tensor, Grid]]:
    """Yields all rows in their order, (rows, in) fp32, with their grid."""
    most_elements = at_once(ACCELERATOR_ELEMENTS)
    block: list[Tensor] = []
    kind: tuple[Grid, torch.dtype] | None = None
    for weight, grid in zip(weights, grids, strict=True):
        for span in row_chunks(weight):
            rows = weight[span]
            elements = rows.numel() + sum(part.numel() for part in block)
            if kind is not None and (rows.is_cpu or kind != (grid, rows.dtype) or elements > most_elements):
                yield _joined(block), kind[0]
                block = []
            block.append(rows)
            kind = grid, rows.dtype
    if kind is not None:
        yield _joined(block), kind[0]


def _joined(block: Sequence[Tensor]) -> Tensor:
    return (block[0] if len(block) == 1 else torch.cat([*block])).float()
