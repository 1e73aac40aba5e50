"""The quantized linear on a GPU: launches, devices, streams, and what must not happen inside a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from models import random_awq_linear
from simulated_gpu import observed

from hf_awq_offload import AwqLinear, QuantizedWeightError

LAST = torch.device("cuda", torch.cuda.device_count() - 1)
"""cuda:1 where there are two, while cuda:0 is the current device."""


def make(backend: str, **kwargs) -> AwqLinear:
    linear = random_awq_linear(256, 128, group_size=64, dtype=torch.bfloat16, **kwargs).to(LAST)
    linear.backend = backend
    return linear


def make_input(rows: int) -> torch.Tensor:
    return torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(LAST, torch.bfloat16)


@pytest.fixture
def capturing(monkeypatch):
    """Returns a function that says whether a CUDA graph is being captured, from then on."""

    def set_capturing(value: bool) -> None:
        for owner in (torch.cuda, torch.cuda.graphs):
            monkeypatch.setattr(owner, "is_current_stream_capturing", lambda: value)

    return set_capturing


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "kernel"), [(1, "gemv_kernel"), (2, "gemm_kernel"), (16, "gemm_kernel")])
def test_a_product_is_one_launch_and_the_host_waits_for_nothing(rows, kernel, bias):
    linear, x = make("triton", bias=bias), make_input(rows)
    expected = x.float() @ linear.dequantized(torch.float32).t() + (linear.bias.float() if bias else 0)
    linear(x)
    observed.reset_counters()
    output = linear(x)
    assert {name: count for name, count in observed.launches_by_operation().items() if count} == {kernel: 1}
    assert observed.counters()["synchronizations"] == 0
    assert (output.float() - expected).norm() / expected.norm() < torch.finfo(torch.bfloat16).eps


def test_a_linear_that_two_streams_use_at_once_shares_no_scratch_memory():
    """The streams do not wait for each other; if they wrote to the same memory, the run would report it."""
    linear = make("triton")
    inputs = [make_input(1), make_input(4)]
    expected = [linear(x) for x in inputs]
    streams = [torch.cuda.Stream(LAST) for _ in inputs]
    current = torch.cuda.current_stream(LAST)
    outputs = []
    for stream, x in zip(streams, inputs, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs.append(linear(x))
    for stream, output, wanted in zip(streams, outputs, expected, strict=True):
        current.wait_stream(stream)
        with torch.cuda.stream(current):
            assert torch.equal(output, wanted)
    assert observed.findings() == []


def test_a_native_layout_is_not_made_inside_a_cuda_graph(capturing):
    linear, x = make("tinygemm", bias=True), make_input(2)
    expected = make("tinygemm", bias=True)(x)
    capturing(True)
    with pytest.raises(QuantizedWeightError, match="Expected: a forward pass before the capture"):
        linear(x)
    assert linear.native_words is None
    capturing(False)
    assert torch.equal(linear(x), expected)
    capturing(True)
    assert torch.equal(linear(x), expected)


def test_a_native_layout_is_not_undone_inside_a_cuda_graph(capturing):
    linear = make("tinygemm")
    linear(make_input(2))
    linear.backend = "torch"
    capturing(True)
    with pytest.raises(QuantizedWeightError, match="Expected: a forward pass before the capture"):
        linear(make_input(2))
    assert linear.native_words is not None


def test_what_a_cuda_graph_reads_stays_when_the_words_are_restored(capturing):
    """A replay reads the memory that the capture saw, even after the model was saved."""
    linear, x = make("tinygemm"), make_input(2)
    linear(x)
    capturing(True)
    linear(x)
    capturing(False)
    native = linear.native_words.data_ptr()
    values = linear.native_words.clone()
    linear.state_dict()
    assert linear.native_words is None
    kept = [tensor for tensor in linear._read_by_graphs if tensor.data_ptr() == native]
    assert len(kept) == 1
    assert torch.equal(kept[0], values)
    assert copy.deepcopy(linear)._read_by_graphs == []


def test_without_a_graph_nothing_is_held_twice():
    linear, x = make("tinygemm"), make_input(2)
    linear(x)
    linear.state_dict()
    assert linear._read_by_graphs == []
