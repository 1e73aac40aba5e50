"""Tests which backend is chosen for a linear on a GPU. The GPU is played by patched questions about it."""

from __future__ import annotations

import pytest
import torch

from hf_awq_offload import ConfigError, ops
from hf_awq_offload.ops import dispatch, triton_backend

REASON = "triton can't compile a kernel here: Failed to find C compiler"
SECOND = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def nothing_chosen_before():
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def capabilities(monkeypatch) -> dict[torch.device, tuple[int, int]]:
    """Lets Triton fail on every GPU; the compute capabilities are those of the returned dict, which tests fill."""
    known: dict[torch.device, tuple[int, int]] = {}
    monkeypatch.setattr(triton_backend, "triton_refusal", lambda device: REASON)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: known[device])
    return known


def linear(device: torch.device, dtype: torch.dtype = torch.bfloat16, group_size: int = 128) -> ops.LinearShape:
    return ops.LinearShape(device, dtype, 4096, 4096, group_size)


def test_without_a_working_triton_the_next_backend_is_used(capabilities):
    capabilities[SECOND] = (8, 0)
    assert ops.choose("auto", linear(SECOND)).name == "tinygemm"
    assert ops.choose("auto", linear(SECOND, torch.float16)).name == "torch"


def test_each_gpu_is_asked_for_its_own_capability(capabilities):
    capabilities |= {torch.device("cuda", 0): (9, 0), SECOND: (7, 5)}
    assert ops.choose("auto", linear(torch.device("cuda", 0))).name == "tinygemm"
    assert ops.choose("auto", linear(SECOND)).name == "torch"
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.0, cuda:1 has 7\.5"):
        ops.choose("tinygemm", linear(SECOND))


def test_if_triton_is_requested_the_error_says_why_it_does_not_work(capabilities):
    with pytest.raises(ConfigError, match=f"can't serve .*: {REASON}"):
        ops.choose("triton", linear(SECOND))


def test_a_linear_that_triton_does_not_serve_is_told_without_a_trial(monkeypatch):
    monkeypatch.setattr(triton_backend, "triton_refusal", lambda device: pytest.fail("a kernel was tried"))
    for refused in (linear(SECOND, torch.float64), linear(SECOND, group_size=8)):
        assert triton_backend.BACKEND.refusal(refused) is not None
