"""Which units multiply fp32 matrices: those that keep all 24 bits of a number, or faster ones that keep fewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch


@contextmanager
def ieee_products() -> Iterator[None]:
    """Multiplies fp32 matrices in fp32 inside the context, whatever the caller allows; on exit the setting is back.

    With TF32 (`torch.backends.cuda.matmul.allow_tf32`, `torch.set_float32_matmul_precision`) a proof of a fold would
    see the rounding of products, and a gram matrix could not be factorized.
    """
    with ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, cast(Any, torch.backends).mkldnn.matmul):
            stack.enter_context(_precision(backend, "ieee"))
        yield


@contextmanager
def exact_on_matrix_units(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Lets fp32 products run on matrix units inside the context, if these lose nothing of numbers that were of `dtype`.

    TF32 keeps the 10 bits of an fp16 mantissa, AMX multiplies bf16; both sum in fp32.
    """
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        backend, precision = torch.backends.cuda.matmul, "tf32"
    elif device.type == "cpu" and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        backend, precision = cast(Any, torch.backends).mkldnn.matmul, "bf16"
    else:
        yield
        return
    with _precision(backend, precision):
        yield


@contextmanager
def tf32_products() -> Iterator[None]:
    """Lets CUDA multiply fp32 matrices in TF32 inside the context; on exit the setting is back."""
    with _precision(torch.backends.cuda.matmul, "tf32"):
        yield


@contextmanager
def _precision(backend: Any, precision: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before
