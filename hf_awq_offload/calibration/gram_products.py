"""Adds products of bf16 or fp16 matrices to an fp32 one, where torch multiplies them as they are: on CUDA.

A product of two bf16 or fp16 numbers is exact in fp32, so multiplying them as they are, with sums in fp32, loses no
more than casting them first. It saves the cast, 4 bytes for each token and channel. torch has such products
(`out_dtype`) on CUDA only, and takes an fp32 sum in more versions for `mm` than for `addmm`, so which of them works is
tried once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..machine_errors import reraise_of_machine

HALF = (torch.bfloat16, torch.float16)

AddProduct = Callable[[Tensor, Tensor, Tensor], object]
"""Adds a product of two half-precision matrices to an fp32 one."""


def adder_for(dtype: torch.dtype, device: torch.device) -> AddProduct | None:
    """Returns what adds products of `dtype` with fp32 sums on `device`; None if torch has nothing that does."""
    if device.type != "cuda" or dtype not in HALF:
        return None
    key = dtype, device
    if key not in _ADDERS:
        _ADDERS[key] = next((add for add in (_add_addmm, _add_mm) if _works(add, dtype, device)), None)
    return _ADDERS[key]


_ADDERS: dict[tuple[torch.dtype, torch.device], AddProduct | None] = {}


def _works(add: AddProduct, dtype: torch.dtype, device: torch.device) -> bool:
    """Tries an adder on numbers whose product bf16 and fp16 could not hold."""
    factor = torch.full((16, 16), 1.0, dtype=dtype, device=device)
    factor[0] = 65  # 65² + 15 + 1 = 4241
    total = torch.ones(16, 32, device=device)[:, ::2].contiguous()
    try:
        add(total[:, 8:], factor.t(), factor[:, 8:])
    except Exception as error:  # no such overload, dtype or kernel
        reraise_of_machine(error)
        return False
    return bool((total[:, 8:] == 65**2 + 15 + 1).all()) and bool((total[:, :8] == 1).all())


def _add_addmm(block: Tensor, left: Tensor, right: Tensor) -> None:
    torch.addmm(block, left, right, out_dtype=torch.float32, out=block)


def _add_mm(block: Tensor, left: Tensor, right: Tensor) -> None:
    block.add_(torch.mm(left, right, out_dtype=torch.float32))
