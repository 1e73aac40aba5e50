"""A linear layer that holds its weight in compressed-tensors' pack-quantized format: 2, 3, 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats.grid import Grid, GroupParameters
from ..formats.layouts import COMPRESSED_TENSORS, PACK_QUANTIZED_NAMES
from ..formats.pack_quantized import PackQuantizedWeight, pack_weight
from ..ops import pack_quantized as ops
from .quantized_linear import QuantizedLinear


class PackedLinear(QuantizedLinear):
    """A linear in the pack-quantized format, with any number of output channels.

    For the arguments see `QuantizedLinear`. Scales are in the dtype that the linear had, because readers of the format
    load them in the model's dtype.
    """

    FORMAT, NAMES = COMPRESSED_TENSORS, PACK_QUANTIZED_NAMES

    weight_packed: nn.Parameter  # (out, ⌈in · bits / 32⌉) int32
    weight_scale: nn.Parameter  # (out, n)
    weight_zero_point: nn.Parameter | None  # (⌈out · bits / 32⌉, n) int32; None on a symmetric grid
    weight_shape: nn.Parameter  # (2,) int64

    @classmethod
    def from_codes(
        cls, codes: Tensor, parameters: GroupParameters, bias: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> PackedLinear:
        out_features, in_features = codes.shape
        linear = cls(in_features, out_features, bias is not None, grid, dtype, device="meta")
        packed = pack_weight(codes, parameters, grid, dtype)
        linear._hold({name: tensor for name, tensor in packed._asdict().items() if tensor is not None}, bias)
        return linear

    @property
    def packed(self) -> PackQuantizedWeight:
        """The tensors that the linear holds."""
        zeros = self.weight_zero_point if self.grid.zero_point else None
        return PackQuantizedWeight(self.weight_packed, self.weight_scale, zeros, self.weight_shape)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize(self.packed, self.in_features, self.grid.bits, dtype)

    def product(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"The input is {tuple(input.shape)}; expected (…, {self.in_features}).")
        output = ops.linear(input, self.packed, self.grid.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)
