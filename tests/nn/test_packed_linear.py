"""A linear of packed weights does what a dense one does, takes no more memory than its words, and trains adapters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from models import dense_twin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_awq_offload import PackedLinear
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range, quantize
from hf_awq_offload.model.linears import is_linear
from hf_awq_offload.ops.blocks import BLOCK_CHANNELS

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
ZERO_POINT = pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_linear(
    bits: int = 3,
    zero_point: bool = True,
    dtype: torch.dtype = torch.float32,
    in_features: int = 96,
    out_features: int = 20,
    group_size: int = 32,
    bias: bool = True,
) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    grid = Grid(bits, group_size, zero_point)
    weight = torch.randn(out_features, in_features, generator=generator)
    parameters = group_parameters(group_range(weight, grid), grid)
    values = torch.randn(out_features, generator=generator) if bias else None
    return PackedLinear.from_codes(quantize(weight, parameters, grid), parameters, values, grid, dtype)


def random_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@BITS
@ZERO_POINT
@DTYPES
class TestProduct:
    @pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (0, 96)], ids=str)
    def test_forward_equals_a_dense_linear(self, bits, zero_point, dtype, shape):
        linear = random_linear(bits, zero_point, dtype)
        x = random_input(*shape, dtype=dtype)
        expected = dense_twin(linear, dtype)(x)
        output = linear(x)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])

    def test_the_gradient_of_the_input_equals_the_dense_one(self, bits, zero_point, dtype):
        linear = random_linear(bits, zero_point, dtype)
        dense = dense_twin(linear, dtype)
        x, y = (random_input(5, 96, dtype=dtype).requires_grad_() for _ in range(2))
        weights = random_input(5, 20, dtype=dtype)
        (linear(x) * weights).sum().backward()
        (dense(y) * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
        assert all(parameter.grad is None for parameter in linear.parameters())


@BITS
def test_the_gradient_is_right_by_finite_differences(bits):
    linear = random_linear(bits, dtype=torch.float64)
    x = random_input(3, 96, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear, x)
    assert torch.autograd.gradgradcheck(linear, x)


@BITS
@ZERO_POINT
def test_more_rows_than_a_block(bits, zero_point):
    linear = random_linear(bits, zero_point, out_features=2 * BLOCK_CHANNELS + 5, in_features=32)
    x = random_input(4, 32)
    torch.testing.assert_close(linear(x), dense_twin(linear, torch.float32)(x))


@BITS
@ZERO_POINT
def test_the_ops_keep_the_rules_of_custom_ops(bits, zero_point):
    linear = random_linear(bits, zero_point)
    packed, scale, zeros, _ = linear.packed
    x = random_input(3, 96).requires_grad_()
    torch.library.opcheck(torch.ops.hf_awq_offload.linear_pack_quantized, (x, packed, scale, zeros, bits))
    gradient = random_input(3, linear.out_features).requires_grad_()
    torch.library.opcheck(
        torch.ops.hf_awq_offload.linear_back_pack_quantized, (gradient, packed, scale, zeros, 96, bits)
    )
    torch.library.opcheck(
        torch.ops.hf_awq_offload.dequantize_pack_quantized, (packed, scale, zeros, 96, bits, torch.float32)
    )


def test_tensors_that_contradict_each_other_are_refused():
    linear = random_linear(3)
    packed, scale, zeros, _ = linear.packed
    product = torch.ops.hf_awq_offload.linear_pack_quantized
    x = random_input(2, 96)
    for tensors, words in [
        ((packed[:, :-1], scale, zeros), "packed is"),
        ((packed.long(), scale, zeros), "packed is"),
        ((packed, scale[:-1], zeros), "scale is"),
        ((packed, scale, zeros[:-1]), "zero_point is"),
        ((packed, scale[:, :0], zeros[:, :0]), "scale is"),
    ]:
        with pytest.raises(ValueError, match=words):
            product(x, *tensors, 3)
    with pytest.raises(ValueError, match="The input is"):
        linear(random_input(2, 95))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_does_what_a_dense_linear_does(dtype):
    linear = random_linear()
    x = random_input(4, 96)
    with torch.autocast("cpu", dtype=dtype):
        output, expected = linear(x), dense_twin(linear, torch.float32)(x)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_gradient_checkpointing_gives_the_same_gradient():
    linear = random_linear()
    x, y = (random_input(4, 96).requires_grad_() for _ in range(2))
    linear(x).square().sum().backward()
    checkpoint(linear, y, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@BITS
def test_nothing_of_the_weight_is_kept_for_the_backward_pass_but_the_packed_tensors(bits):
    linear = random_linear(bits)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(random_input(2, 96).requires_grad_())
    stored = {tensor.data_ptr() for tensor in linear.parameters()}
    assert {tensor.data_ptr() for tensor in kept} <= stored


@BITS
@ZERO_POINT
def test_the_memory_is_that_of_the_words(bits, zero_point):
    linear = random_linear(bits, zero_point, in_features=1024, out_features=256, group_size=128, bias=False)
    held_bytes = sum(tensor.nbytes for tensor in linear.state_dict().values())
    words_bytes = 1024 * 256 * bits // 8
    parameter_bytes = 256 * 8 * (4 + (bits / 8 if zero_point else 0))
    assert held_bytes == words_bytes + parameter_bytes + 16
    assert not list(linear.buffers())


@ZERO_POINT
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_has_the_names_of_the_format_and_loads(zero_point, bias):
    linear = random_linear(3, zero_point, bias=bias)
    state = linear.state_dict()
    expected = ["weight_packed", "weight_scale", *["weight_zero_point"] * zero_point, "weight_shape", *["bias"] * bias]
    assert list(state) == expected
    empty = PackedLinear(96, 20, bias, linear.grid, device="meta")
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty.weight, linear.weight)
    assert all(not parameter.requires_grad for parameter in linear.parameters())


def pickled(linear: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_equal_and_independent(copied: Callable):
    linear = random_linear()
    twin = copied(linear)
    x = random_input(2, 96)
    assert torch.equal(twin(x), linear(x))
    with torch.no_grad():
        twin.weight_packed.zero_()
    assert not torch.equal(twin(x), linear(x))


def test_a_cast_changes_the_bias_and_the_dtype_of_the_weight_and_leaves_scales():
    linear = random_linear()
    weight = linear.weight
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert half.bias.dtype == half.weight.dtype == torch.bfloat16
    assert half.weight_scale.dtype == torch.float32
    assert half.weight_shape.dtype == torch.int64
    assert torch.equal(half.weight, weight.to(torch.bfloat16))


def test_it_is_a_linear_whose_dense_form_computes_the_same():
    linear = random_linear()
    assert isinstance(linear, nn.Linear)
    dense = linear.to_dense(torch.float32)
    assert type(dense) is nn.Linear
    assert is_linear(dense)
    x = random_input(2, 96)
    torch.testing.assert_close(dense(x), linear(x))
    assert dense.weight.requires_grad
    assert "bits=3, group_size=32, asymmetric" in repr(linear)


@pytest.mark.parametrize("bits", [3, 4])
def test_under_torch_compile(bits):
    linear = random_linear(bits)
    x = random_input(4, 96)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x))


def test_any_number_of_output_channels_and_groups_that_divide():
    assert PackedLinear.unpackable_reason(96, 7, 32) is None
    assert PackedLinear.unpackable_reason(96, 7, -1) is None
    assert "96 is not a multiple of the group size 64" in PackedLinear.unpackable_reason(96, 8, 64)
