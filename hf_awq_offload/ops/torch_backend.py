"""Multiplies block by block in plain torch: the reference, and the fallback where no faster backend is available."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..formats.awq import PackedWeight
from .backend import LinearShape, WordsBackend
from .blocks import multiply_blocks


class TorchBackend(WordsBackend):
    """Serves every device, dtype and shape."""

    name = "torch"

    def refusal(self, linear: LinearShape) -> str | None:
        return None

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        return multiply_blocks(x, partial(self.blocks, packed), packed.scales.shape[1])


BACKEND = TorchBackend()
