"""The reference, and what is used where nothing faster is: dequantize a block of columns, multiply, next block."""

from __future__ import annotations

from torch import Tensor

from ..packing import PackedWeight
from .backend import Case, WordsBackend
from .blocks import codes_of_words, linear_codes


class TorchBackend(WordsBackend):
    """Serves every device, dtype and shape."""

    name = "torch"

    def refusal(self, case: Case) -> str | None:
        return None

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        return linear_codes(x, codes_of_words(packed.qweight), packed.qzeros, packed.scales)


BACKEND = TorchBackend()
