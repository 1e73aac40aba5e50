"""Tests on a real card that a forward pass can be captured in a CUDA graph, by hand and by torch.compile.

tests/simulated_gpu/inside/test_linear_on_cuda.py tests, without a card, what must not happen during a capture.
"""

from __future__ import annotations

import pytest
import torch
from backends import needs_gpu, needs_triton
from models import random_awq_linear

from hf_awq_offload import AwqLinear, QuantizedWeightError

pytestmark = needs_gpu
GPU_BACKENDS = pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton), "tinygemm", "torch"])


def make(backend: str) -> AwqLinear:
    linear = random_awq_linear(512, 256, group_size=64, dtype=torch.bfloat16, bias=True).to("cuda")
    linear.backend = backend
    return linear


def make_input(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def captured(linear: AwqLinear, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = linear(x)
    return graph, output


@GPU_BACKENDS
@pytest.mark.parametrize("rows", [1, 4, 16, 300])
def test_a_replay_gives_what_a_call_gives(backend, rows):
    linear, x = make(backend), make_input(rows)
    with torch.inference_mode():
        linear(x)
    graph, output = captured(linear, x)
    for seed in (2, 3):
        x.copy_(make_input(rows, seed))
        graph.replay()
        with torch.inference_mode():
            assert torch.equal(output, linear(x))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_replay_is_right_after_the_model_was_saved(rows):
    linear, x = make("tinygemm"), make_input(rows)
    with torch.inference_mode():
        expected = linear(x)
    graph, output = captured(linear, x)
    linear.state_dict()
    torch.cuda.empty_cache()
    graph.replay()
    assert torch.equal(output, expected)


def test_a_first_call_inside_a_capture_says_what_to_do():
    with pytest.raises(QuantizedWeightError, match="Expected: a forward pass before the capture"):
        captured(make("tinygemm"), make_input(1))


@GPU_BACKENDS
def test_compiled_with_cuda_graphs_it_gives_the_same(backend):
    linear = make(backend)
    compiled = torch.compile(linear, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        linear(make_input(1))
        for seed in range(4):  # the first calls compile, warm up and record
            x = make_input(1, seed)
            torch.testing.assert_close(compiled(x).clone(), linear(x), rtol=2e-2, atol=2e-2)


@needs_triton
@pytest.mark.parametrize("rows", [1, 8])
def test_calls_on_two_streams_at_once_give_what_one_gives(rows):
    linear, x = make("triton"), make_input(rows)
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.inference_mode():
        expected = linear(x)
        torch.cuda.synchronize()
        outputs = []
        for i in range(200):
            with torch.cuda.stream(streams[i % 2]):
                outputs.append(linear(x))
        torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)
