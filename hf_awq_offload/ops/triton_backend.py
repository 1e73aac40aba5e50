"""Multiplies on CUDA and ROCm: Triton kernels dequantize in registers; for many rows, dequantize and multiply densely.

Block sizes are fixed, not autotuned, because autotuning compiles dozens of kernels at the first token. The block sizes,
and the row count from which a dense product is used, are estimates until a GPU has measured them (docs/kernels.md).
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.awq import COLUMNS_PER_WORD, PackedWeight
from ..triton_trial import LAUNCH_OPTIONS, interpreting, triton_refusal
from .backend import LinearShape, WordsBackend
from .blocks import Blocks

MANY_ROWS = 256
"""Rows from which the weight is dequantized for a dense product: the product then takes longer than reading it."""

MIN_SEGMENT = 16
"""Fewest input channels that tl.dot multiplies. Segments lie within a group."""
WORDS = 4
"""AWQ words of a row that a program reads, and a thread at once: 16 bytes, 32 output channels."""
WORDS_TO_DEQUANTIZE = 8
WARPS = 8
LANES = 32


class Tile(NamedTuple):
    """What one program of `gemm_kernel` multiplies by its columns, per warp."""

    rows: int
    channels: int


TILES_OF_HALVES = (Tile(16, 64), Tile(32, 32), Tile(64, 32))
TILES_OF_FLOATS = (Tile(16, 16), Tile(32, 16))
"""By rising number of rows: the largest without spilled registers (tests/ops/test_triton_compiles.py)."""


class TritonBackend(WordsBackend):
    """Multiplies with Triton kernels; see the module."""

    name = "triton"

    def refusal(self, linear: LinearShape) -> str | None:
        if linear.device.type != "cuda" and not (interpreting() and linear.device.type == "cpu"):
            return f"its kernels run on CUDA and ROCm, the input is on {linear.device.type!r}"
        if linear.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it serves fp16, bf16 and fp32, the input is {linear.dtype}"
        if linear.group_size % MIN_SEGMENT:
            return f"group size {linear.group_size} is not a multiple of {MIN_SEGMENT}"
        return triton_refusal(linear.device)

    def linear(self, x: Tensor, packed: PackedWeight) -> Tensor:
        if x.shape[0] >= MANY_ROWS:
            return x @ self.dequantize(packed, x.dtype).t()
        return _fused(x, _contiguous(packed), None)

    def biased_linear(self, x: Tensor, packed: PackedWeight, bias: Tensor) -> Tensor:
        if x.shape[0] >= MANY_ROWS:
            return nn.functional.linear(x, self.dequantize(packed, x.dtype), bias.to(x.dtype))
        return _fused(x, _contiguous(packed), bias.contiguous())

    def blocks(self, packed: PackedWeight, dtype: torch.dtype) -> Blocks:
        return [(slice(0, packed.scales.shape[1]), self.dequantize(packed, dtype))]

    def dequantize(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        (in_features, row_words), groups = packed.qweight.shape, packed.scales.shape[0]
        weight = torch.empty(row_words * COLUMNS_PER_WORD, in_features, dtype=dtype, device=packed.qweight.device)
        block_k = segment_for(in_features // groups, 64)
        grid = (-(-row_words // WORDS_TO_DEQUANTIZE), in_features // block_k)
        _launch(
            kernels().dequantize_kernel, grid, weight, *_contiguous(packed), weight, in_features, row_words,
            K_GROUP=in_features // groups, BLOCK_K=block_k, WORDS=WORDS_TO_DEQUANTIZE,
        )  # fmt: skip
        return weight


BACKEND = TritonBackend()


@cache
def kernels() -> ModuleType:
    """Returns the module of the kernels, which only imports where Triton is installed."""
    return import_module(".triton_kernels", __package__)


def _contiguous(packed: PackedWeight) -> PackedWeight:
    if all(tensor.is_contiguous() for tensor in packed):
        return packed
    return PackedWeight(*(tensor.contiguous() for tensor in packed))


def _fused(
    x: Tensor,  # (M, K), M ≥ 1
    packed: PackedWeight,
    bias: Tensor | None,  # (N,)
) -> Tensor:
    """Returns x Wᵀ + bias, (M, N), in one launch, without dequantizing the whole weight."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (rows, in_features), row_words = x.shape, packed.qweight.shape[1]
    output = x.new_empty(rows, row_words * COLUMNS_PER_WORD)
    group_size = in_features // packed.scales.shape[0]
    tensors = (x, *packed, x if bias is None else bias, output)  # a kernel without a bias does not read the pointer
    if rows == 1:
        segment, grid, constants = _gemv_plan(row_words, group_size, x.dtype, x.device)
        numbers: tuple[int, ...] = (row_words, in_features // segment)
        _launch(kernels().gemv_kernel, grid, x, *tensors, *numbers, HAS_BIAS=bias is not None, **constants)
    else:
        segment, grid, constants = _gemm_plan(rows, row_words, group_size, x.dtype, x.device)
        numbers = (rows, row_words, in_features // segment, x.stride(0))
        _launch(kernels().gemm_kernel, grid, x, *tensors, *numbers, HAS_BIAS=bias is not None, **constants)
    return output


class Plan(NamedTuple):
    """How a kernel is launched."""

    segment: int  # input channels that are multiplied together
    grid: tuple[int, ...]
    constants: dict[str, Any]


@cache
def _gemv_plan(row_words: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Returns how to multiply one row.

    If there is at most one program per processor, it gets twice the warps, which then have 128 registers each: enough
    for halves, while fp32 inputs would spill some.
    """
    segment, columns = segment_for(group_size, 64), -(-row_words // WORDS)
    lanes = min(segment, LANES)
    warps = 2 * WARPS if columns <= _processors(device) and dtype != torch.float32 else WARPS
    constants = {
        "K_GROUP": group_size, "STEPS": segment // lanes, "LANES": lanes, "SEGMENTS": warps, "WORDS": WORDS,
        "num_warps": warps,
    }  # fmt: skip
    return Plan(segment, (columns,), constants)


@lru_cache(maxsize=4096)
def _gemm_plan(rows: int, row_words: int, group_size: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Returns how to multiply several rows."""
    tile = tile_for(rows, dtype)
    segment = segment_for(group_size, tile.channels)
    constants = {
        "UPCAST": interpreting(), "K_GROUP": group_size, "BLOCK_M": tile.rows, "BLOCK_K": segment, "SEGMENTS": WARPS,
        "WORDS": WORDS, "num_warps": WARPS, "num_stages": _stages(device),
    }  # fmt: skip
    return Plan(segment, (-(-row_words // WORDS), -(-rows // tile.rows)), constants)


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: object, **constants: object) -> None:
    """Launches on the device of `like`: Triton launches on the current one, whatever the tensors are on."""
    index = like.get_device()
    if index < 0 or index == torch.cuda.current_device():  # entering a context takes longer than asking
        kernel[grid](*arguments, **constants, **LAUNCH_OPTIONS)
        return
    with torch.cuda.device(index):
        kernel[grid](*arguments, **constants, **LAUNCH_OPTIONS)


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    """Returns the smallest tile that has all rows, or else the largest."""
    tiles = TILES_OF_FLOATS if dtype == torch.float32 else TILES_OF_HALVES
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def segment_for(group_size: int, most: int) -> int:
    """Returns the largest power of two up to `most` that divides the group size."""
    return min(group_size & -group_size, most)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _stages(device: torch.device) -> int:
    """Returns how many tiles of `gemm_kernel` are in shared memory: two take 57 KiB, three 82 KiB.

    GPUs of compute capability 8.0 and up have 99 KiB or more, AMD's of today and older ones of NVIDIA 64 KiB.
    """
    is_large = device.type == "cuda" and torch.version.hip is None
    return 3 if is_large and torch.cuda.get_device_capability(device) >= (8, 0) else 2
