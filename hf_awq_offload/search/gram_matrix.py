"""A gram matrix on the device, or one that stays in RAM, of which blocks of rows come to the device.

A gram matrix of 28,672 channels takes 3.3 GB. Where a device cannot hold it beside its factor, every step of the search
reads it from RAM, once for each chunk of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..transfers import sent

BLOCK_CHANNELS = 1024
"""Rows that are on the device at a time."""


@dataclass(frozen=True)
class GramInRam:
    """A gram matrix in RAM, symmetric, for a search on another device."""

    matrix: Tensor  # (in, in) fp32, on the CPU
    device: torch.device
    scale: Tensor | None = None  # (in,) on the device; the input is divided by it

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    @property
    def is_cpu(self) -> bool:
        """Whether the search runs on a CPU."""
        return False

    def rows(self, span: slice, first_column: int = 0) -> Tensor:
        """Returns rows of the matrix of the scaled input on the device, (rows, in - first_column)."""
        block = self._sent(self.matrix[span, first_column:])
        return block if self.scale is None else block.div_(torch.outer(self.scale[span], self.scale[first_column:]))

    def rows_of(
        self,
        channels: Tensor,  # (rows,) int64, on the CPU
    ) -> Tensor:
        """Returns the rows of these channels, (rows, in)."""
        block = self._sent(self.matrix.index_select(0, channels))
        if self.scale is None:
            return block
        return block.div_(torch.outer(self.scale[sent(channels, self.device)], self.scale))

    def diagonal_blocks(self, size: int) -> Tensor:
        """Returns blocks of `size` channels on the diagonal, (n, size, size)."""
        blocks = self._sent(torch.stack([self.matrix[span, span] for span in spans(len(self), size)]))
        if self.scale is None:
            return blocks
        own = self.scale.view(-1, size)
        return blocks.div_(own[:, :, None] * own[:, None, :])

    def _sent(self, numbers: Tensor) -> Tensor:
        """Returns a copy on the device."""
        return numbers.clone() if numbers.device == self.device else sent(numbers, self.device)


Gram = Tensor | GramInRam
"""(in, in) fp32."""


def spans(size: int, step: int) -> Iterator[slice]:
    """Yields spans that cover `size` things, `step` at a time."""
    return (slice(start, min(size, start + step)) for start in range(0, size, step))


def block_bytes(in_features: int) -> int:
    """Returns what a block of rows takes on the device: itself, and the divisors of its numbers."""
    return 2 * 4 * min(BLOCK_CHANNELS, in_features) * in_features
