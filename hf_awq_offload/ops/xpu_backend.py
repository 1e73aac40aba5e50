"""Multiplies on Intel GPUs with `aten._weight_int4pack_mm_with_scales_and_zeros`, which takes AWQ's zero points as is.

    w = (q - z) · scale

The layout is read back by a product with the identity. This backend follows torch's and torchao's use of the op; no
machine that has tested this package had such a GPU (docs/kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.awq import PackedWeight, pack_columns, unpack_columns
from .backend import Case, NativeBackend, NativeWeight
from .blocks import codes_of_words

INNER_K_TILES = 8
MANY_ROWS = 64
IDENTITY_ROWS = 512
IDENTITY_GROUP_SIZE = 32


class XpuBackend(NativeBackend):
    """Multiplies with torch's int4 op for Intel GPUs; see the module.

    `NativeWeight.parameters` holds the zero points; scales are used as they are stored.
    """

    name = "xpu"

    def refusal(self, case: Case) -> str | None:
        if case.device_type != "xpu":
            return f"it runs on Intel GPUs only, the input is on {case.device_type!r}"
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_with_scales_and_zeros"):
            return "this torch has no int4 product for Intel GPUs"
        if case.dtype not in (torch.float16, torch.bfloat16):
            return f"it serves fp16 and bf16, the input is {case.dtype}"
        if case.group_size % IDENTITY_GROUP_SIZE:
            return f"group size {case.group_size} is not a multiple of {IDENTITY_GROUP_SIZE}"
        return None

    def pack(self, packed: PackedWeight) -> NativeWeight:
        codes = codes_of_words(packed.qweight)(0, packed.scales.shape[1]).t().to(torch.uint8)  # (N, K)
        pairs = (codes[:, 1::2] << 4 | codes[:, ::2]).contiguous()  # the even channel in the low bits
        words = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
        return NativeWeight(words, unpack_columns(packed.qzeros).to(torch.int8).contiguous())

    def unpack(self, words: Tensor, in_features: int, out_features: int) -> Tensor:
        n = in_features // IDENTITY_GROUP_SIZE
        scales = torch.ones(n, out_features, dtype=torch.float16, device=words.device)
        zeros = torch.zeros(n, out_features, dtype=torch.int8, device=words.device)
        qweight = torch.empty(in_features, out_features // 8, dtype=torch.int32, device=words.device)
        for first in range(0, in_features, IDENTITY_ROWS):
            last = min(first + IDENTITY_ROWS, in_features)
            identity = torch.zeros(last - first, in_features, dtype=torch.float16, device=words.device)
            identity.diagonal(first).fill_(1)
            codes = _product(identity, words, IDENTITY_GROUP_SIZE, scales, zeros)
            qweight[first:last] = pack_columns(codes.to(torch.int32))
        return qweight

    def linear(self, x: Tensor, native: NativeWeight, qzeros: Tensor, scales: Tensor) -> Tensor:
        if x.shape[0] >= MANY_ROWS:
            return x @ self.dequantize(native.words, qzeros, scales, x.shape[1], x.dtype).t()
        group_size = x.shape[1] // scales.shape[0]
        return _product(x.contiguous(), native.words, group_size, scales.to(x.dtype), native.parameters)


BACKEND = XpuBackend()


def _product(
    x: Tensor,  # (M, K) fp16 or bf16
    words: Tensor,
    group_size: int,
    scales: Tensor,  # (n, N) in x's dtype
    zeros: Tensor,  # (n, N) int8
) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros(x, words, group_size, scales, zeros)
