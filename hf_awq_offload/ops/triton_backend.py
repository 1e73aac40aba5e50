"""Multiplies on CUDA and ROCm: Triton kernels dequantize in registers; for many rows, dequantize and multiply densely.

Block sizes are fixed, not autotuned, because autotuning compiles dozens of kernels at the first token. The block sizes,
and the row count from which a dense product is used, are estimates until a GPU has measured them (docs/kernels.md).
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ..formats.awq import PackedWeight
from .backend import LinearShape, WordsBackend
from .blocks import Blocks

MANY_ROWS = 256
"""Rows from which the weight is dequantized for a dense product: the product then takes longer than reading it."""

MIN_BLOCK_K = 16  # the smallest that tl.dot accepts
MAX_BLOCK_K = 64
BLOCK_N = 64
PROGRAMS_PER_PROCESSOR = 4


class TritonBackend(WordsBackend):
    """Multiplies with Triton kernels; see the module."""

    name = "triton"

    def refusal(self, linear: LinearShape) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if linear.device_type != "cuda" and not (interpreting() and linear.device_type == "cpu"):
            return f"its kernels run on CUDA and ROCm, the input is on {linear.device_type!r}"
        if linear.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it serves fp16, bf16 and fp32, the input is {linear.dtype}"
        if linear.group_size % MIN_BLOCK_K:
            return f"group size {linear.group_size} is not a multiple of {MIN_BLOCK_K}"
        return None

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        if x.shape[0] >= MANY_ROWS:
            return x @ self.dequantize(packed, x.dtype).t()
        return _fused(x, _contiguous(packed))

    def blocks(self, packed: PackedWeight, dtype: torch.dtype) -> Blocks:
        return [(slice(0, packed.scales.shape[1]), self.dequantize(packed, dtype))]

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        from .triton_kernels import dequantize_kernel, triton

        in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
        group_size = in_features // packed.scales.shape[0]
        weight = torch.empty(out_features, in_features, dtype=dtype, device=packed.qweight.device)
        block_k = block_k_for(group_size)
        grid = (in_features // block_k, triton.cdiv(out_features, BLOCK_N))
        with torch.cuda.device_of(weight):  # on which Triton launches
            dequantize_kernel[grid](
                *_contiguous(packed), weight, in_features, out_features,
                K_GROUP=group_size, BLOCK_K=block_k, BLOCK_N=BLOCK_N,
            )  # fmt: skip
        return weight


BACKEND = TritonBackend()


def _contiguous(packed: PackedWeight) -> PackedWeight:
    return PackedWeight(*(tensor.contiguous() for tensor in packed))


def _fused(
    x: Tensor,  # (M, K), any strides
    packed: PackedWeight,
) -> Tensor:
    """Returns x Wᵀ, (M, N), without dequantizing the whole weight."""
    from .triton_kernels import gemm_kernel, gemv_kernel, triton

    (rows, in_features), out_features = x.shape, packed.scales.shape[1]
    group_size = in_features // packed.scales.shape[0]
    block_k = block_k_for(group_size)
    block_m = min(max(triton.next_power_of_2(rows), 16), 64)
    tiles_of_k = in_features // block_k
    tiles_of_output = triton.cdiv(out_features, BLOCK_N) * triton.cdiv(rows, block_m)
    splits = max(1, min(PROGRAMS_PER_PROCESSOR * _processors(x.device) // tiles_of_output, tiles_of_k))
    # A power of two, because TILES is compiled into the kernel: fewer values mean fewer compilations.
    tiles = triton.next_power_of_2(triton.cdiv(tiles_of_k, splits))
    splits = triton.cdiv(tiles_of_k, tiles)
    partial = torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
    columns = triton.cdiv(out_features, BLOCK_N)
    blocks = {"K_GROUP": group_size, "TILES": tiles, "BLOCK_K": block_k, "BLOCK_N": BLOCK_N}
    with torch.cuda.device_of(x):  # on which Triton launches
        if rows == 1:
            gemv_kernel[(columns, splits)](
                x, *packed, partial, in_features, out_features, x.stride(1), **blocks
            )  # fmt: skip
        else:
            gemm_kernel[(columns, splits, triton.cdiv(rows, block_m))](
                x, *packed, partial, rows, in_features, out_features, *x.stride(),
                UPCAST=interpreting(), BLOCK_M=block_m, **blocks,
            )  # fmt: skip
    return partial.sum(0).to(x.dtype) if splits > 1 else partial[0].to(x.dtype)


def block_k_for(group_size: int) -> int:
    """Returns the largest power of two up to MAX_BLOCK_K that divides the group size."""
    block = MAX_BLOCK_K
    while group_size % block:
        block //= 2
    return block


def interpreting() -> bool:
    """Returns whether Triton runs kernels in its interpreter on the CPU, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
