"""Stand-ins for torch's int4 product on CUDA, which a CPU build lacks.

`_convert_weight_to_int4pack` packs the weight, `_weight_int4pack_mm` multiplies by it.
On a card the words have an order that only the product can read. Here they are in plain order, with the same shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 32


def _pack(
    pairs: Tensor,  # (N, K / 2) uint8: the even channel in the high bits
    inner_k_tiles: int,
) -> Tensor:  # (N / 8, K / (inner_k_tiles * 16), LANES, inner_k_tiles / 2) int32
    rows, columns = pairs.shape
    if rows % 8 or 2 * columns % (16 * inner_k_tiles):
        raise RuntimeError(f"_convert_weight_to_int4pack: a weight of {tuple(pairs.shape)} pairs can't be tiled")
    words = pairs.contiguous().view(torch.int32)
    return words.view(rows // 8, 2 * columns // (inner_k_tiles * 16), LANES, inner_k_tiles // 2).clone()


def _multiply(
    x: Tensor,  # (M, K) bf16
    words: Tensor,  # as _pack returns
    group_size: int,
    parameters: Tensor,  # (K / group_size, N, 2) bf16: scale and zero
) -> Tensor:  # (M, N) bf16
    if x.dtype != torch.bfloat16 or parameters.dtype != torch.bfloat16:
        raise RuntimeError(f"_weight_int4pack_mm takes bf16, not {x.dtype} and {parameters.dtype}")
    pairs = words.view(parameters.shape[1], -1).view(torch.uint8)  # (N, K / 2)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1).to(torch.float32)  # (N, K)
    scale, zero = parameters.float().repeat_interleave(group_size, 0).unbind(-1)  # (K, N)
    weight = ((codes.t() - 8) * scale + zero).to(torch.bfloat16)
    return x @ weight


_library: torch.library.Library | None = None


def install() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_convert_weight_to_int4pack", _pack, "CUDA")
    _library.impl("_weight_int4pack_mm", _multiply, "CUDA")
