"""The backends that read their layout by a product with the identity, with torch's kernels played by plain torch.

The kernels run on devices that few machines have: `test_behaviour.py` runs them there. Here they pack nothing, so that
what surrounds them is checked everywhere: which channel is in which half of a byte, zero points, and the way back.
"""

from __future__ import annotations

import pytest
import torch
from models import random_awq_linear
from torch import Tensor

from hf_awq_offload.ops.tinygemm_backend import BACKEND as TINYGEMM
from hf_awq_offload.ops.xpu_backend import BACKEND as XPU

IN, OUT, GROUP_SIZE = 1152, 48, 64  # more input channels than are read at once


def halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low bits of every byte, (N, K / 2) each."""
    pairs = words.view(torch.uint8)
    return pairs >> 4, pairs & 15


def spread(parameters: Tensor, group_size: int) -> Tensor:
    """Of groups (n, N), to channels (N, K)."""
    return parameters.float().repeat_interleave(group_size, dim=0).t()


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    def pack(pairs: Tensor, inner_k_tiles: int) -> Tensor:
        return pairs.view(torch.int32)

    def tinygemm(x: Tensor, words: Tensor, group_size: int, parameters: Tensor) -> Tensor:
        shifted = torch.stack(halves(words), dim=-1).flatten(-2).float() - 8  # the even channel in the high bits
        weight = shifted * spread(parameters[..., 0], group_size) + spread(parameters[..., 1], group_size)
        return (x.float() @ weight.t()).to(x.dtype)

    def xpu(x: Tensor, words: Tensor, group_size: int, scales: Tensor, zeros: Tensor) -> Tensor:
        codes = torch.stack(halves(words)[::-1], dim=-1).flatten(-2).float()  # the even channel in the low bits
        return (x.float() @ ((codes - spread(zeros, group_size)) * spread(scales, group_size)).t()).to(x.dtype)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", tinygemm)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_with_scales_and_zeros", xpu, raising=False)


@pytest.mark.parametrize("backend", [TINYGEMM, XPU], ids=lambda backend: backend.name)
def test_words_come_back_to_the_bit(backend):
    packed = random_awq_linear(IN, OUT, group_size=GROUP_SIZE).packed
    native = backend.pack(packed)
    assert torch.equal(backend.unpack(native.words, IN, OUT), packed.qweight)


@pytest.mark.parametrize("backend", [TINYGEMM, XPU], ids=lambda backend: backend.name)
@pytest.mark.parametrize("rows", [1, 5, 64, 100])
def test_the_product_is_that_of_the_weight(backend, rows):
    linear = random_awq_linear(IN, OUT, group_size=GROUP_SIZE, dtype=torch.bfloat16)
    packed = linear.packed
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(0)).bfloat16()
    actual = backend.linear(x, backend.pack(packed), packed.qzeros, packed.scales).double()
    expected = x.double() @ linear.weight.detach().double().t()
    assert float((actual - expected).norm() / expected.norm()) < torch.finfo(torch.bfloat16).eps
