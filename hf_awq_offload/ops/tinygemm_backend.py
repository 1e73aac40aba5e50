"""Multiplies on CUDA without Triton: `aten._weight_int4pack_mm`, for bf16 on GPUs of compute capability 8.0 and up.

    w = (q - 8) · scale + zero,  zero = (8 - z) · scale, in bf16

The formula is that of the CPU, but the layout differs. A product with the identity reads it back: q - 8 is exact.
No machine that has tested this package needed this backend; docs/kernels.md says what has been run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.awq import PackedWeight, unpack_columns
from .backend import LinearShape, NativeWeight
from .blocks import codes_of_words
from .int4pack import INNER_K_TILES, Int4PackBackend

KERNEL_GROUP_SIZES = (256, 128, 64, 32)


class TinygemmBackend(Int4PackBackend):
    """Multiplies with torch's int4 op for CUDA; see the module."""

    name = "tinygemm"
    identity_dtype = torch.bfloat16

    def refusal(self, linear: LinearShape) -> str | None:
        if linear.device.type != "cuda":
            return f"it runs on CUDA only, the input is on {linear.device.type!r}"
        if torch.version.hip is not None:
            return "it runs on NVIDIA GPUs only"
        capability = torch.cuda.get_device_capability(linear.device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0, {linear.device} has {capability[0]}.{capability[1]}"
        if linear.dtype != torch.bfloat16:
            return f"it serves bf16, the input is {linear.dtype}"
        if linear.group_size not in KERNEL_GROUP_SIZES:
            return f"group size {linear.group_size} is not one of {KERNEL_GROUP_SIZES}"
        if linear.out_features % 8 or linear.in_features % (INNER_K_TILES * 16):
            return (
                f"a shape of {linear.in_features} to {linear.out_features} channels is not a multiple of "
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

    def codes_reader(self, words: Tensor, in_features: int, out_features: int) -> Callable[[Tensor], Tensor]:
        ones = torch.ones(in_features // KERNEL_GROUP_SIZES[-1], out_features, device=words.device)
        parameters = torch.stack([ones, torch.zeros_like(ones)], dim=-1).to(torch.bfloat16)

        def codes_of(identity: Tensor) -> Tensor:
            shifted = torch.ops.aten._weight_int4pack_mm(identity, words, KERNEL_GROUP_SIZES[-1], parameters)
            return shifted.to(torch.int32) + 8

        return codes_of

    def product(self, x: Tensor, native: NativeWeight, scales: Tensor) -> Tensor:
        group_size = x.shape[1] // scales.shape[0]
        return torch.ops.aten._weight_int4pack_mm(x, native.words, group_size, native.parameters)


BACKEND = TinygemmBackend()
