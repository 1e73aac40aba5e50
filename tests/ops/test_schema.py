"""Tests the custom ops as torch sees them: opcheck, checks of sizes before a kernel runs, and no graph breaks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from backends import DEVICE, HAS_GPU, needs_triton
from models import random_awq_linear
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hf_awq_offload import ops
from hf_awq_offload.formats.awq import PackedWeight
from hf_awq_offload.ops import cpu_backend

_ops = torch.ops.hf_awq_offload
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize(("op", "width"), [(_ops.linear, 64), (_ops.linear_back, 32)], ids=["linear", "linear_back"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "c", pytest.param("triton", marks=needs_triton)])
def test_products(dtype, op, width, shape, backend):
    packed = PackedWeight(*(tensor.to(DEVICE[backend]) for tensor in random_awq_linear(64, 32, dtype=dtype).packed))
    x = torch.randn(*shape, width).to(DEVICE[backend], dtype)
    opcheck(op, (x, *packed, backend))
    opcheck(op, (x.requires_grad_(), *packed, backend))


@DTYPES
def test_linear_back_native(dtype):
    packed = random_awq_linear(64, 128, dtype=dtype).packed
    words = cpu_backend.BACKEND.pack(packed).words
    gradient = torch.randn(3, 128).to(dtype)
    opcheck(_ops.linear_back_native, (gradient, words, packed.qzeros, packed.scales, 64, "cpu"))
    opcheck(_ops.linear_back_native, (gradient.requires_grad_(), words, packed.qzeros, packed.scales, 64, "cpu"))


@DTYPES
@pytest.mark.parametrize("rows", [3, 100])
def test_linear_native(dtype, rows):
    packed = random_awq_linear(64, 128, dtype=dtype).packed
    native = cpu_backend.BACKEND.pack(packed)
    x = torch.randn(rows, 64).to(dtype)
    opcheck(_ops.linear_native, (x, *native, packed.qzeros, packed.scales, "cpu"))
    opcheck(_ops.linear_native, (x.requires_grad_(), *native, packed.qzeros, packed.scales, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dequantize(dtype):
    packed = random_awq_linear(64, 128).packed
    native = cpu_backend.BACKEND.pack(packed)
    opcheck(_ops.dequantize_native, (native.words, packed.qzeros, packed.scales, 64, dtype, "cpu"))
    weight = ops.dequantize(packed, dtype)
    assert torch.equal(weight, ops.dequantize_native(native.words, packed.qzeros, packed.scales, 64, dtype, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["c", "cpu", pytest.param("triton", marks=needs_triton)])
def test_every_backend_dequantizes_to_the_same_bits(backend, dtype):
    packed = PackedWeight(*(tensor.to(DEVICE[backend]) for tensor in random_awq_linear(64, 128).packed))
    opcheck(_ops.dequantize, (*packed, dtype, backend))
    weight, expected = ops.dequantize(packed, dtype, backend), ops.dequantize(packed, dtype, "torch")
    interpreted = backend == "triton" and not HAS_GPU
    if interpreted and dtype == torch.bfloat16:  # the interpreter truncates instead of rounding
        torch.testing.assert_close(weight, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(weight, expected)


BAD_SIZES = {
    "qweight too short": lambda q, z, s: (q[:32], z, s),
    "qweight too narrow": lambda q, z, s: (q[:, :2], z, s),
    "qweight of another dtype": lambda q, z, s: (q.to(torch.int64), z, s),
    "qweight in one dimension": lambda q, z, s: (q.flatten(), z, s),
    "qzeros too short": lambda q, z, s: (q, z[:1], s),
    "qzeros too narrow": lambda q, z, s: (q, z[:, :1], s),
    "qzeros in fp16": lambda q, z, s: (q, z.to(torch.float16), s),
    "scales too narrow": lambda q, z, s: (q, z, s[:, :8]),
    "groups that do not divide": lambda q, z, s: (q[:63], z, s),
    "no groups": lambda q, z, s: (q, z[:0], s[:0]),
    "scales of integers": lambda q, z, s: (q, z, s.to(torch.int32)),
}


@pytest.mark.parametrize("change", BAD_SIZES.values(), ids=BAD_SIZES)
@pytest.mark.parametrize("backend", ["torch", "c", "cpu", pytest.param("triton", marks=needs_triton)])
def test_tensors_that_contradict_each_other_never_reach_a_kernel(change, backend):
    packed = change(*(tensor.detach() for tensor in random_awq_linear(64, 32).packed))
    with pytest.raises(ValueError, match="expected"):
        _ops.linear(torch.randn(2, 64), *packed, backend)


def test_an_input_of_another_width_is_refused():
    packed = random_awq_linear(64, 32).packed
    with pytest.raises(ValueError, match=r"expected floating point \(…, 64\)"):
        ops.linear(torch.randn(2, 32), packed)
    linear = random_awq_linear(64, 32)
    with pytest.raises(ValueError, match=r"expected floating point \(…, 64\)"):
        linear(torch.randn(2, 32))


@pytest.mark.parametrize("backend", ["torch", "c", "cpu"])
def test_an_input_on_another_device_is_refused(backend):
    packed = random_awq_linear(64, 128).to("meta").packed
    with pytest.raises(ValueError, match="The input is on cpu, the weight on meta"):
        ops.linear(torch.randn(2, 64), packed, backend)


@pytest.mark.parametrize("backend", ["torch", "c", pytest.param("triton", marks=needs_triton)])
def test_a_bias_that_does_not_fit_never_reaches_a_kernel(backend):
    packed = PackedWeight(*(tensor.to(DEVICE[backend]) for tensor in random_awq_linear(64, 32).packed))
    x = torch.randn(2, 64, device=DEVICE[backend])
    for bias in (torch.zeros(8, device=x.device), torch.zeros(32, dtype=torch.int64, device=x.device)):
        with pytest.raises(ValueError, match=r"The bias is .*; expected floating point \(32,\)"):
            ops.linear(x, packed, backend, bias=bias)
    with pytest.raises(ValueError, match="The bias is on meta"):
        ops.linear(x, packed, backend, bias=torch.zeros(32, device="meta"))


class Seen(TorchDispatchMode):
    """Records the names of the ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_watches_ops_sees_the_op():
    linear, x = random_awq_linear(64, 128), torch.randn(2, 64)
    expected = linear(x)
    with torch.no_grad(), Seen() as seen:
        actual = linear(x)
    assert torch.equal(actual, expected)
    assert seen.names == ["hf_awq_offload::linear"]

    graph = make_fx(linear)(x)
    assert torch.ops.hf_awq_offload.linear.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(2 * x), linear(2 * x))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but people still trace
        traced = torch.jit.trace(linear, x, check_trace=False)
    assert torch.equal(traced(2 * x), linear(2 * x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(x)).shape == (2, 128)
    torch.testing.assert_close(torch.vmap(linear)(x), expected)


@pytest.mark.parametrize("backend", ["torch", "c", "cpu"])
def test_the_default_device_is_of_no_matter(backend):
    linear, x = random_awq_linear(64, 128), torch.randn(2, 64)
    linear.backend = backend
    expected = copy.deepcopy(linear)(x)
    with torch.device("meta"):
        assert torch.equal(linear(x), expected)
        assert linear.weight.device.type == "cpu"


@pytest.mark.parametrize("out_features", [24, 128], ids=["torch", "native"])
@pytest.mark.parametrize("warm", [True, False], ids=["after a forward pass", "at once"])
def test_a_forward_pass_compiles_without_graph_breaks(out_features, warm):
    torch.compiler.reset()
    linear = random_awq_linear(64, out_features, bias=True)
    x = torch.randn(2, 3, 64)
    expected = linear(x) if warm else None
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    actual = compiled(x)
    expected = linear(x) if expected is None else expected
    assert (actual - expected).norm() / expected.norm() < torch.finfo(torch.bfloat16).eps
    x.requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand_as(x))
