"""AwqLinear is a linear layer with the dequantized weight, in every way that callers use one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import dense_twin, random_awq_linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_awq_offload import QuantizedWeightError
from hf_awq_offload.formats.awq import unpack_weight
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.nn.awq_linear import AwqLinear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of a dot product's sum, and one rounding of the bias."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    atol = 4 * eps * max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=atol)


@DTYPES
@BIAS
@pytest.mark.parametrize("shape", [(5, 64), (1, 64), (64,), (2, 3, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)], ids=str)
def test_forward_equals_a_dense_linear(dtype, bias, shape):
    linear = random_awq_linear(bias=bias, dtype=dtype)
    x = inputs(*shape, dtype=dtype)
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    assert expected.dtype == dtype
    assert_same(linear(x), expected)


@pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [8, 32, 64])
def test_forward_equals_a_dense_linear_for_every_grid(zero_point, group_size):
    linear = random_awq_linear(group_size=group_size, zero_point=zero_point)
    x = inputs(5, 64)
    assert_same(linear(x), x @ unpack_weight(linear.packed, torch.float32).t())


@DTYPES
@BIAS
def test_the_output_has_the_dtype_of_the_input_whatever_the_dtype_of_the_model(dtype, bias):
    linear = random_awq_linear(bias=bias, dtype=torch.bfloat16)
    x = inputs(5, 64, dtype=dtype)
    weight = unpack_weight(linear.packed, dtype)
    assert_same(linear(x), nn.functional.linear(x, weight, None if linear.bias is None else linear.bias.to(dtype)))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat(1, 2)[:, ::2],
        lambda x: x.repeat_interleave(3, dim=0)[::3],
        lambda x: x[:1].expand(5, -1),
        lambda x: x.flip(0),
    ],
    ids=["transposed", "every other column", "every third row", "expanded", "flipped"],
)
def test_forward_and_gradient_take_inputs_that_are_not_contiguous(view):
    linear = random_awq_linear(bias=True)
    x = view(inputs(5, 64)).requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x).square().sum(), x)
    dense_x = x.detach().clone().contiguous().requires_grad_()
    dense = nn.functional.linear(dense_x, linear.weight, linear.bias)
    (expected,) = torch.autograd.grad(dense.square().sum(), dense_x)
    assert_same(linear(x).detach(), dense.detach())
    assert_same(gradient, expected)


@DTYPES
@BIAS
def test_the_gradient_of_the_input_equals_the_dense_one(dtype, bias):
    linear = random_awq_linear(bias=bias, dtype=dtype)
    dense = dense_twin(linear, dtype)
    x, dense_x = (inputs(2, 3, 64, dtype=dtype).requires_grad_() for _ in range(2))
    upstream = inputs(2, 3, 24, dtype=dtype, seed=2)
    linear(x).backward(upstream)
    dense(dense_x).backward(upstream)
    assert_same(x.grad, dense_x.grad)


def test_the_gradient_is_right_in_fp64_by_finite_differences():
    """The weight is exact in fp64 (an integer times an fp16 scale), so the whole chain computes in fp64."""
    linear = random_awq_linear(in_features=8, out_features=8, group_size=8, bias=True, dtype=torch.float64)
    x = inputs(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear, (x,))
    assert torch.autograd.gradgradcheck(linear, (x,))


def test_a_gradient_that_is_not_contiguous_flows_back():
    linear = random_awq_linear()
    x = inputs(5, 64).requires_grad_()
    linear(x).sum().backward()  # an expanded scalar
    assert_same(x.grad, linear.weight.sum(dim=0).expand(5, -1))


def test_nothing_of_the_weight_is_kept_for_the_backward_pass_but_the_packed_tensors():
    linear = random_awq_linear()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(inputs(5, 64).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {parameter.data_ptr() for parameter in linear.parameters()}


@BIAS
def test_parameters_are_frozen_and_get_no_gradient(bias):
    linear = random_awq_linear(bias=bias)
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    linear(inputs(5, 64).requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in linear.parameters())
    assert not linear(inputs(5, 64)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BIAS
def test_under_autocast_it_does_what_a_dense_linear_does(dtype, bias):
    linear = random_awq_linear(bias=bias)
    dense = dense_twin(linear, torch.float32)
    x, dense_x = (inputs(2, 3, 64).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=dtype):
        output, expected = linear(x), dense(dense_x)
    assert output.dtype == dtype
    assert_same(output.detach(), expected.detach())
    upstream = inputs(2, 3, 24, dtype=dtype, seed=2)
    output.backward(upstream)
    expected.backward(upstream)
    assert x.grad.dtype == torch.float32
    # The dense weight is rounded to the autocast dtype from fp32, as the packed one is.
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=2e-2, atol=2e-2)


def test_where_autocast_is_switched_off_again_it_computes_in_the_dtype_of_the_input():
    linear = random_awq_linear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert linear(inputs(5, 64)).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(use_reentrant):
    linear = random_awq_linear(bias=True)
    x, checkpointed = (inputs(5, 64).requires_grad_() for _ in range(2))
    linear(x).square().sum().backward()
    checkpoint(linear, checkpointed, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, checkpointed.grad)


def test_it_is_an_nn_linear():
    linear = random_awq_linear(bias=True)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (64, 24)
    assert linear.weight.shape == (24, 64)
    assert linear.weight.dtype == torch.float32
    linear.reset_parameters()
    assert_same(linear(inputs(5, 64)), random_awq_linear(bias=True)(inputs(5, 64)))


@BIAS
def test_the_state_dict_has_the_names_and_shapes_of_the_format(bias):
    state = random_awq_linear(bias=bias, dtype=torch.bfloat16).state_dict()
    expected = {
        "qweight": ((64, 3), torch.int32),
        "qzeros": ((2, 3), torch.int32),
        "scales": ((2, 24), torch.float16),
    }
    if bias:
        expected["bias"] = ((24,), torch.bfloat16)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == expected


@BIAS
def test_a_state_dict_loads_into_an_uninitialized_linear(bias):
    linear = random_awq_linear(bias=bias)
    for device, assign in (("cpu", False), ("meta", True)):
        loaded = AwqLinear(64, 24, bias, Grid(4, 32, True), torch.float32, device=device)
        loaded.load_state_dict(linear.state_dict(), assign=assign)
        assert torch.equal(loaded(inputs(5, 64)), linear(inputs(5, 64)))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_linear_on_the_meta_device_takes_no_memory():
    linear = AwqLinear(64, 24, True, Grid(4, 32, True), torch.bfloat16, device="meta")
    assert all(parameter.is_meta for parameter in linear.parameters())
    assert linear.weight.is_meta
    assert linear(torch.empty(5, 64, device="meta", dtype=torch.bfloat16)).shape == (5, 24)


def test_nothing_is_copied_from_packed():
    linear = random_awq_linear(bias=True)
    again = AwqLinear.from_packed(linear.packed, linear.bias, linear.grid, linear.dtype)
    assert [p.data_ptr() for p in again.parameters()] == [p.data_ptr() for p in linear.parameters()]


def test_the_dtype_defaults_to_torchs():
    linear = AwqLinear(64, 24, True, Grid(4, 32, True))
    assert linear.dtype == linear.bias.dtype == torch.get_default_dtype()


def save_and_load(linear: AwqLinear) -> AwqLinear:
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@BIAS
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_equal_and_independent(copied, bias):
    linear = random_awq_linear(bias=bias, zero_point=False)
    other = copied(linear)
    assert type(other) is AwqLinear
    assert other.grid == linear.grid
    assert other.dtype == linear.dtype
    assert torch.equal(other(inputs(5, 64)), linear(inputs(5, 64)))
    assert not any(parameter.requires_grad for parameter in other.parameters())
    before = linear.weight
    other.qweight.zero_()
    assert torch.equal(linear.weight, before)


def test_to_a_device_moves_every_tensor_and_keeps_its_dtype():
    linear = random_awq_linear(bias=True, dtype=torch.bfloat16)
    dtypes = [parameter.dtype for parameter in linear.parameters()]
    assert linear.to("meta") is linear
    assert all(parameter.is_meta for parameter in linear.parameters())
    assert [parameter.dtype for parameter in linear.parameters()] == dtypes
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_packed_words_are_not_touched_by_a_cast_and_widened_scales_mean_the_same_weight():
    linear = random_awq_linear(bias=True)
    weight = linear.weight
    linear.to(torch.float64)  # what upcasts all floating-point parameters for training does to scales
    assert (linear.qweight.dtype, linear.qzeros.dtype) == (torch.int32, torch.int32)
    assert torch.equal(linear.weight, weight)


def test_a_copy_in_bf16_still_holds_its_scales_in_fp16():
    """bf16 has fewer digits: rounding scales to it would change every weight, and the checkpoint would not be AWQ."""
    linear = random_awq_linear(bias=True)
    weight = linear.weight
    linear.to(torch.bfloat16)
    assert linear.scales.dtype == torch.float16
    torch.testing.assert_close(linear.weight.float(), weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize(("zero_point", "kind"), [(True, "asymmetric"), (False, "symmetric")])
def test_its_repr_says_how_it_is_quantized(zero_point, kind):
    text = repr(random_awq_linear(zero_point=zero_point))
    assert text == f"AwqLinear(in_features=64, out_features=24, bias=False, bits=4, group_size=32, {kind})"


@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size"),
    [(128, 8, 128), (384, 16, 128), (64, 24, 32), (100, 8, -1), (8, 8, -1)],
)
def test_a_shape_that_fits_has_no_reason_against_it(in_features, out_features, group_size):
    assert AwqLinear.unpackable_reason(in_features, out_features, group_size) is None


@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size", "words"),
    [
        (100, 8, 128, ["in_features 100", "group size 128"]),
        (192, 8, 128, ["in_features 192", "group size 128"]),
        (64, 8, 128, ["in_features 64", "group size 128"]),
        (128, 12, 128, ["out_features 12", "multiple of 8"]),
        (128, 1, -1, ["out_features 1", "multiple of 8"]),
        (100, 12, 32, ["in_features 100", "group size 32"]),
    ],
)
def test_a_shape_that_does_not_fit_is_explained(in_features, out_features, group_size, words):
    reason = AwqLinear.unpackable_reason(in_features, out_features, group_size)
    assert reason is not None
    for word in words:
        assert word in reason


@pytest.mark.parametrize("rows", [5, 200], ids=["few rows", "many rows"])
def test_callers_may_add_to_the_output_in_place(rows):
    linear = random_awq_linear(out_features=64)
    x = inputs(2, rows, 64).requires_grad_()
    output = linear(x)
    output += 1
    output.sum().backward()
    assert_same(x.grad, linear.weight.sum(dim=0).expand(2, rows, -1))


# -- the weight is there to be read ----------------------------------------------------------------------------------

WRITES = {
    "adding to .data": lambda linear: linear.weight.data.__iadd__(1),
    "setting .data": lambda linear: setattr(linear.weight, "data", torch.zeros(24, 64)),
    "an in-place operator": lambda linear: linear.weight.__imul__(2),
    "an in-place method": lambda linear: linear.weight.mul_(2),
    "a copy into it": lambda linear: linear.weight.copy_(torch.zeros(24, 64)),
    "an element": lambda linear: linear.weight.__setitem__((0, 0), 1),
    "a slice": lambda linear: linear.weight[:3].zero_(),
    "a transposed view": lambda linear: linear.weight.t().zero_(),
    "a detached view": lambda linear: linear.weight.detach().zero_(),
    "a part of a split": lambda linear: linear.weight.chunk(2)[0].zero_(),
    "out=": lambda linear: torch.add(torch.zeros(24, 64), 1, out=linear.weight),
    "an initialization": lambda linear: nn.init.normal_(linear.weight),
    "requires_grad": lambda linear: setattr(linear.weight, "requires_grad", True),
    "requires_grad_()": lambda linear: linear.weight.requires_grad_(),
    "another tensor": lambda linear: setattr(linear, "weight", torch.zeros(24, 64)),
    "another parameter": lambda linear: setattr(linear, "weight", nn.Parameter(torch.zeros(24, 64))),
    "training": lambda linear: linear.requires_grad_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_would_be_lost_is_refused(write):
    linear = random_awq_linear()
    before = linear.weight.clone()
    with pytest.raises(QuantizedWeightError, match=r"few bits.*dequantize\(\)"):
        WRITES[write](linear)
    assert torch.equal(linear.weight, before)


def test_reading_the_weight_gives_plain_tensors():
    linear = random_awq_linear()
    weight = linear.weight
    results = [
        weight + 1,
        weight.clone(),
        weight.float() * 2,
        weight.norm(),
        nn.functional.linear(inputs(2, 64), weight),
    ]
    assert {type(result) for result in results} == {torch.Tensor}
    results[1].add_(1)
    assert torch.equal(results[1], weight + 1)
    linear.weight = linear.weight  # as PEFT does when it takes adapters off
    linear.requires_grad_(False)
    weight.requires_grad_(False)
    assert torch.equal(linear.weight, weight)
