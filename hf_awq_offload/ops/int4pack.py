"""What the backends share whose layout only a kernel of torch can read: it is read back by a product with the identity.

torch packs the integers by `aten._convert_weight_to_int4pack`, in an order that depends on the device, and offers no
inverse. Multiplied by rows of the identity, with scales of 1, the packed weight gives its integers, exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.awq import pack_columns
from .backend import NativeBackend, NativeWeight

INNER_K_TILES = 8
MANY_ROWS = 64
"""From so many on the weight is dequantized and multiplied by the vendor's product."""
IDENTITY_ROWS = 512


class Int4PackBackend(NativeBackend):
    """A backend with a layout of `aten._convert_weight_to_int4pack`."""

    identity_dtype: torch.dtype
    """The dtype of the identity; it holds all integers of 4 bits exactly."""

    @abstractmethod
    def product(
        self,
        x: Tensor,  # contiguous (M, K)
        native: NativeWeight,
        scales: Tensor,  # (n, N)
    ) -> Tensor:
        """x Wᵀ by the kernel, (M, N) in x's dtype."""

    @abstractmethod
    def codes_reader(self, words: Tensor, in_features: int, out_features: int) -> Callable[[Tensor], Tensor]:
        """Rows of the identity, (M, K) in `identity_dtype` -> the integers of their input channels, (M, N) int32."""

    def unpack(self, words: Tensor, in_features: int, out_features: int) -> Tensor:
        codes_of = self.codes_reader(words, in_features, out_features)
        qweight = torch.empty(in_features, out_features // 8, dtype=torch.int32, device=words.device)
        for first in range(0, in_features, IDENTITY_ROWS):
            last = min(first + IDENTITY_ROWS, in_features)
            identity = torch.zeros(last - first, in_features, dtype=self.identity_dtype, device=words.device)
            identity.diagonal(first).fill_(1)
            qweight[first:last] = pack_columns(codes_of(identity))
        return qweight

    def linear(self, x: Tensor, native: NativeWeight, qzeros: Tensor, scales: Tensor) -> Tensor:
        if x.shape[0] >= MANY_ROWS:
            return x @ self.dequantize(native.words, qzeros, scales, x.shape[1], x.dtype).t()
        return self.product(x.contiguous(), native, scales)
