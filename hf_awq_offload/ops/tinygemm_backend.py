"""Multiplies on CUDA without Triton: `aten._weight_int4pack_mm`, for bf16 on GPUs of compute capability 8.0 and up.

    w = (q - 8) · scale + zero,  zero = (8 - z) · scale, in bf16

The formula is that of the CPU, but the layout differs. A product with the identity reads it back: q - 8 is exact.
No machine that has tested this package needed this backend; docs/kernels.md says what has been run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.awq import PackedWeight, pack_columns, unpack_columns
from .backend import Case, NativeBackend, NativeWeight
from .blocks import codes_of_words

INNER_K_TILES = 8
KERNEL_GROUP_SIZES = (256, 128, 64, 32)
MANY_ROWS = 64
IDENTITY_ROWS = 512


class TinygemmBackend(NativeBackend):
    """Multiplies with torch's int4 op for CUDA; see the module."""

    name = "tinygemm"

    def refusal(self, case: Case) -> str | None:
        if case.device_type != "cuda":
            return f"it runs on CUDA only, the input is on {case.device_type!r}"
        if torch.version.hip is not None:
            return "it runs on NVIDIA GPUs only"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {torch.cuda.get_device_capability()}"
        if case.dtype != torch.bfloat16:
            return f"it serves bf16, the input is {case.dtype}"
        if case.group_size not in KERNEL_GROUP_SIZES:
            return f"group size {case.group_size} is not one of {KERNEL_GROUP_SIZES}"
        if case.out_features % 8 or case.in_features % (INNER_K_TILES * 16):
            return (
                f"a shape of {case.in_features} to {case.out_features} channels is not a multiple of "
                f"{INNER_K_TILES * 16} by 8"
            )
        return None

    def pack(self, packed: PackedWeight) -> NativeWeight:
        in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
        codes = codes_of_words(packed.qweight)(0, out_features).t().to(torch.uint8)  # (N, K)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()  # the even channel in the high bits
        words = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
        scale = packed.scales.to(torch.bfloat16)
        zero = ((8 - unpack_columns(packed.qzeros).float()) * scale.float()).to(torch.bfloat16)
        assert words.numel() * 8 == in_features * out_features
        return NativeWeight(words, torch.stack([scale, zero], dim=-1).contiguous())

    def unpack(self, words: Tensor, in_features: int, out_features: int) -> Tensor:
        ones = torch.ones(in_features // KERNEL_GROUP_SIZES[-1], out_features, device=words.device)
        parameters = torch.stack([ones, torch.zeros_like(ones)], dim=-1).to(torch.bfloat16)
        qweight = torch.empty(in_features, out_features // 8, dtype=torch.int32, device=words.device)
        for first in range(0, in_features, IDENTITY_ROWS):
            last = min(first + IDENTITY_ROWS, in_features)
            identity = torch.zeros(last - first, in_features, dtype=torch.bfloat16, device=words.device)
            identity.diagonal(first).fill_(1)
            shifted = torch.ops.aten._weight_int4pack_mm(identity, words, KERNEL_GROUP_SIZES[-1], parameters)
            qweight[first:last] = pack_columns(shifted.to(torch.int32) + 8)
        return qweight

    def linear(self, x: Tensor, native: NativeWeight, qzeros: Tensor, scales: Tensor) -> Tensor:
        if x.shape[0] >= MANY_ROWS:
            return x @ self.dequantize(native.words, qzeros, scales, x.shape[1], x.dtype).t()
        group_size = x.shape[1] // scales.shape[0]
        return torch.ops.aten._weight_int4pack_mm(x.contiguous(), native.words, group_size, native.parameters)


BACKEND = TinygemmBackend()
