"""Tests that the caller's choice of faster fp32 products reaches no step of a run, and is back after it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from models import tiny_llama, token_recipe
from torch import nn

from hf_awq_offload import quantize_model
from hf_awq_offload.precision import ieee_products

BACKENDS = (torch.backends.cuda.matmul, cast(Any, torch.backends).mkldnn.matmul)


def precisions() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def faster_products():
    """Allows TF32 and bf16 products for fp32 matrices, as a caller may."""
    before = precisions()
    for backend, precision in zip(BACKENDS, ("tf32", "bf16"), strict=True):
        backend.fp32_precision = precision
    yield precisions()
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


@ieee_products()
def raise_with_ieee_products() -> None:
    raise ValueError(precisions())


def test_products_are_ieee_inside_and_as_before_after_an_error(faster_products):
    with pytest.raises(ValueError, match=r"ieee.*ieee"):
        raise_with_ieee_products()
    assert precisions() == faster_products == ["tf32", "bf16"]


def test_a_run_multiplies_in_fp32_whatever_the_caller_allows(faster_products):
    model, seen = tiny_llama(), []
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.append(precisions()))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    quantize_model(model, token_recipe())
    for handle in handles:
        handle.remove()
    assert seen
    assert all("tf32" not in precision for precision in seen)
    assert precisions() == faster_products
