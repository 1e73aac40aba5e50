"""The reference, and what is used where nothing faster is: dequantize a block of columns, multiply, next block."""

from __future__ import annotations

from torch import Tensor

from ..packing import PackedWeight
from .backend import Case, WordsBackend
from .blocks import matmul_dtype, multiply_blocks


class TorchBackend(WordsBackend):
    """Serves every device, dtype and shape."""

    name = "torch"

    def refusal(self, case: Case) -> str | None:
        return None

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        dtype = matmul_dtype(x.device.type, x.dtype)
        return multiply_blocks(x, self.blocks(packed, dtype), packed.scales.shape[1], dtype)


BACKEND = TorchBackend()
