"""Tests every backend with one suite: each computes x Wᵀ with the weight that the AWQ words encode.

The reference is a product in fp64 with the weight that tests/references unpacks independently of the package.
"""

from __future__ import annotations

import copy

import pytest
import torch
from backends import BACKENDS, DEVICE
from models import random_awq_linear
from references.awq_reader import dequantize_linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_awq_offload import AwqLinear, ConfigError, ops
from hf_awq_offload.ops.dispatch import backend_named

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
EPS_BF16 = torch.finfo(torch.bfloat16).eps
MANY_ROWS = 300  # above every backend's crossover


def make(backend: str, dtype: torch.dtype, in_features=256, out_features=128, group_size=64, **kwargs) -> AwqLinear:
    """Returns a linear that requests `backend`, or "auto", which must serve every linear, if `backend` refuses."""
    linear = random_awq_linear(in_features, out_features, dtype=dtype, group_size=group_size, **kwargs)
    linear = linear.to(DEVICE[backend])
    linear.backend = backend
    shape = ops.LinearShape(torch.device(DEVICE[backend]), dtype, in_features, out_features, group_size)
    if backend_named(backend).refusal(shape) is not None:
        with pytest.raises(ConfigError, match=f"{backend}.*can't serve"):
            linear(torch.ones(1, in_features, dtype=dtype, device=DEVICE[backend]))
        linear.backend = "auto"
    return linear


def make_input(linear: AwqLinear, *shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return x.to(linear.scales.device, dtype)


def reference_weight(linear: AwqLinear) -> Tensor:
    """Returns the linear's weight in fp64, on its device."""
    packed = copy.deepcopy(linear).packed
    weight = torch.from_numpy(dequantize_linear(*(tensor.detach().cpu().numpy() for tensor in packed)))
    return weight.double().to(linear.scales.device)


def reference(linear: AwqLinear, x: Tensor) -> Tensor:
    """Returns the expected output in fp64."""
    output = x.detach().double() @ reference_weight(linear).t()
    return output if linear.bias is None else output + linear.bias.double()


def assert_close(actual: Tensor, expected: Tensor, linear: AwqLinear, dtype: torch.dtype) -> None:
    """Asserts equality up to rounding.

    Rounding of x and the weight averages out over a sum. An fp32 sum of n terms is off by about √n · u, u = eps / 2, in
    whatever order a CPU or a card adds them up (Higham and Mary, 2019, "A new approach to probabilistic rounding error
    analysis", Theorem 3.1).
    """
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    if not actual.numel():
        return
    # The cpu backend computes few rows in bf16 for every input dtype, as its module says.
    coarse = linear.backend == "cpu" or dtype == torch.bfloat16
    eps = EPS_BF16 if coarse else torch.finfo(dtype).eps
    error = (actual.double() - expected).norm() / expected.norm()
    n_terms = max(linear.in_features, linear.out_features)
    bound = n_terms**0.5 * eps / 2 if eps == torch.finfo(torch.float32).eps else eps
    assert error < bound, float(error / eps)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 5, 33, MANY_ROWS])
def test_rows(backend, dtype, rows):
    linear = make(backend, dtype)
    x = make_input(linear, rows, 256, dtype=dtype)
    assert_close(linear(x), reference(linear, x), linear, dtype)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512], ids=lambda size: f"g{size}")
@pytest.mark.parametrize("rows", [1, 7, MANY_ROWS])
def test_group_sizes_up_to_the_whole_row(backend, dtype, group_size, rows):
    linear = make(backend, dtype, in_features=512, group_size=group_size)
    x = make_input(linear, rows, 512, dtype=dtype)
    assert_close(linear(x), reference(linear, x), linear, dtype)


@BACKENDS
@pytest.mark.parametrize("group_size", [16, 48, 96])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_group_sizes_that_are_no_multiple_of_a_tile(backend, group_size, rows):
    linear = make(backend, torch.float16, in_features=5 * group_size, group_size=group_size)
    x = make_input(linear, rows, 5 * group_size, dtype=torch.float16)
    assert_close(linear(x), reference(linear, x), linear, torch.float16)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("out_features", [8, 72, 96, 192, 520, 1056])
@pytest.mark.parametrize("rows", [1, 5, MANY_ROWS])
def test_output_channels_that_fill_no_tile(backend, dtype, out_features, rows):
    linear = make(backend, dtype, out_features=out_features)
    x = make_input(linear, rows, 256, dtype=dtype)
    assert_close(linear(x), reference(linear, x), linear, dtype)


@BACKENDS
@pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])
def test_grids(backend, zero_point):
    linear = make(backend, torch.bfloat16, zero_point=zero_point)
    x = make_input(linear, 3, 256, dtype=torch.bfloat16)
    assert_close(linear(x), reference(linear, x), linear, torch.bfloat16)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 0, 256), (2, 3, 256), (2, 3, 2, 256), (2, 200, 256)], ids=str)
def test_shapes_and_bias(backend, dtype, shape):
    linear = make(backend, dtype, bias=True)
    x = make_input(linear, *shape, dtype=dtype)
    assert_close(linear(x), reference(linear, x), linear, dtype)


@BACKENDS
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat(1, 2)[:, ::2],
        lambda x: x.repeat_interleave(3, dim=0)[::3],
        lambda x: x[:1].expand(5, -1),
        lambda x: x.unflatten(0, (5, 1)).transpose(0, 1),
    ],
    ids=["transposed", "every other column", "every third row", "expanded", "3-D transposed"],
)
def test_inputs_that_are_not_contiguous(backend, view):
    linear = make(backend, torch.bfloat16)
    x = view(make_input(linear, 5, 256, dtype=torch.bfloat16))
    assert_close(linear(x), reference(linear, x), linear, torch.bfloat16)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", [(3,), (MANY_ROWS,), (2, 3), (0,), ()], ids=str)
def test_the_gradient_is_that_of_the_dequantized_weight(backend, dtype, shape):
    linear = make(backend, dtype, out_features=520, bias=True)
    x = make_input(linear, *shape, 256, dtype=dtype).requires_grad_()
    output = linear(x)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    assert_close(x.grad, upstream.double() @ reference_weight(linear), linear, dtype)
    assert all(parameter.grad is None for parameter in linear.parameters())


@BACKENDS
def test_a_bias_that_is_trained_gets_its_gradient(backend):
    linear = make(backend, torch.float32, bias=True)
    linear.bias.requires_grad_()
    output = linear(make_input(linear, 3, 256, dtype=torch.float32))
    upstream = torch.randn_like(output)
    output.backward(upstream)
    torch.testing.assert_close(linear.bias.grad, upstream.sum(dim=0))


@BACKENDS
def test_the_gradient_of_the_gradient_is_the_product(backend):
    """A penalty on the gradient's norm needs this."""
    linear = make(backend, torch.float32)
    x = make_input(linear, 3, 256, dtype=torch.float32).requires_grad_()
    upstream = torch.randn(3, 128, device=x.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x), x, upstream, create_graph=True)
    direction = torch.randn_like(gradient)
    (second,) = torch.autograd.grad(gradient, upstream, direction)
    assert_close(second, reference(linear, direction), linear, torch.float32)


@BACKENDS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(backend, use_reentrant):
    linear = make(backend, torch.bfloat16)
    x, checkpointed = (make_input(linear, 5, 256, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    linear(x).float().square().sum().backward()
    checkpoint(linear, checkpointed, use_reentrant=use_reentrant).float().square().sum().backward()
    assert torch.equal(x.grad, checkpointed.grad)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_it_computes_in_autocasts_dtype_and_the_gradient_in_the_inputs(backend, dtype):
    linear = make(backend, torch.float32)
    x = make_input(linear, 5, 256, dtype=torch.float32).requires_grad_()
    with torch.autocast(DEVICE[backend], dtype=dtype):
        output = linear(x)
        assert output.dtype == dtype
        output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    expected = linear.weight.sum(dim=0).expand(5, -1)
    assert (x.grad - expected).norm() / expected.norm() < 2 * EPS_BF16


@BACKENDS
def test_a_second_call_and_a_call_after_training_give_the_same(backend):
    linear = make(backend, torch.bfloat16)
    x = make_input(linear, 2, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = linear(x)
    linear(x.clone().requires_grad_()).sum().backward()
    assert torch.equal(first, linear(x))
