"""Multiplies on Intel GPUs with `aten._weight_int4pack_mm_with_scales_and_zeros`, which takes AWQ's zero points as is.

    w = (q - z) · scale

The layout is read back by a product with the identity. This backend follows torch's and torchao's use of the op; no
machine that has tested this package had such a GPU (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.awq import PackedWeight, unpack_columns
from .backend import LinearShape, NativeWeight
from .blocks import codes_of_words
from .int4pack import INNER_K_TILES, Int4PackBackend

IDENTITY_GROUP_SIZE = 32


class XpuBackend(Int4PackBackend):
    """Multiplies with torch's int4 op for Intel GPUs; see the module.

    `NativeWeight.parameters` holds the zero points; scales are used as they are stored.
    """

    name = "xpu"
    identity_dtype = torch.float16

    def refusal(self, linear: LinearShape) -> str | None:
        if linear.device.type != "xpu":
            return f"it runs on Intel GPUs only, the input is on {linear.device.type!r}"
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_with_scales_and_zeros"):
            return "this torch has no int4 product for Intel GPUs"
        if linear.dtype not in (torch.float16, torch.bfloat16):
            return f"it serves fp16 and bf16, the input is {linear.dtype}"
        if linear.group_size % IDENTITY_GROUP_SIZE:
            return f"group size {linear.group_size} is not a multiple of {IDENTITY_GROUP_SIZE}"
        return None

    def pack(self, packed: PackedWeight) -> NativeWeight:
        codes = codes_of_words(packed.qweight)(0, packed.scales.shape[1]).t().to(torch.uint8)  # (N, K)
        pairs = (codes[:, 1::2] << 4 | codes[:, ::2]).contiguous()  # the even channel in the low bits
        words = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
        return NativeWeight(words, unpack_columns(packed.qzeros).to(torch.int8).contiguous())

    def codes_reader(self, words: Tensor, in_features: int, out_features: int) -> Callable[[Tensor], Tensor]:
        n = in_features // IDENTITY_GROUP_SIZE
        scales = torch.ones(n, out_features, dtype=self.identity_dtype, device=words.device)
        zeros = torch.zeros(n, out_features, dtype=torch.int8, device=words.device)
        return lambda identity: _product(identity, words, IDENTITY_GROUP_SIZE, scales, zeros).to(torch.int32)

    def product(self, x: Tensor, native: NativeWeight, scales: Tensor) -> Tensor:
        group_size = x.shape[1] // scales.shape[0]
        return _product(x, native.words, group_size, scales.to(x.dtype), native.parameters)


BACKEND = XpuBackend()


def _product(
    x: Tensor,  # (M, K) fp16 or bf16
    words: Tensor,
    group_size: int,
    scales: Tensor,  # (n, N) in x's dtype
    zeros: Tensor,  # (n, N) int8
) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(x, words, group_size, scales, zeros)
