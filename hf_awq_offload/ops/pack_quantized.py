"""Defines custom ops that multiply by a weight in the pack-quantized layout. Plain torch, any device.

    linear_pack_quantized(x, packed, scale, zero_point, bits)                             x Wᵀ: (…, K) -> (…, N)
    linear_back_pack_quantized(gradient, packed, scale, zero_point, in_features, bits)    gradient W: (…, N) -> (…, K)
    dequantize_pack_quantized(packed, scale, zero_point, in_features, bits, dtype)        W: (N, K)

The ops dequantize and multiply one block of rows of W at a time, so that no full-precision weight is kept. Only x gets
a gradient; the backward pass dequantizes again, and only the packed tensors are saved for it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..formats.pack_quantized import PackQuantizedWeight, dequantize_rows, unpack_zeros, words_for
from .blocks import BLOCK_CHANNELS, Blocks, joined, multiply_blocks
from .schema import NAMESPACE, check_input, times_blocks, without_autocast

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_PACKED = "Tensor packed, Tensor scale, Tensor? zero_point"
for _schema in (
    f"linear_pack_quantized(Tensor x, {_PACKED}, int bits) -> Tensor",
    f"linear_back_pack_quantized(Tensor gradient, {_PACKED}, int in_features, int bits) -> Tensor",
    f"dequantize_pack_quantized({_PACKED}, int in_features, int bits, ScalarType dtype) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def linear(
    x: Tensor,  # (…, K)
    weight: PackQuantizedWeight,
    bits: int,
) -> Tensor:
    """Returns x Wᵀ, (…, N) in x's dtype, differentiable with respect to x.

    Raises:
        ValueError: the tensors' shapes or dtypes contradict each other.
    """
    return _ops.linear_pack_quantized(x, weight.weight_packed, weight.weight_scale, weight.weight_zero_point, bits)


def dequantize(
    weight: PackQuantizedWeight,
    in_features: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the weight, (N, K) in `dtype`; (q - z) · Δ is computed in fp32 and rounded once."""
    return _ops.dequantize_pack_quantized(
        weight.weight_packed, weight.weight_scale, weight.weight_zero_point, in_features, bits, dtype
    )


def _linear(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    in_features = x.shape[-1]
    _check(packed, scale, zero_point, in_features, bits)
    check_input(x, in_features, packed.device)
    weight = partial(_blocks, packed, scale, zero_point, in_features, bits)
    with without_autocast(x.device.type):
        output = multiply_blocks(x.reshape(-1, in_features), weight, packed.shape[0])
    return output.view(*x.shape[:-1], packed.shape[0])


def _linear_back(
    gradient: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, bits: int
) -> Tensor:
    _check(packed, scale, zero_point, in_features, bits)
    check_input(gradient, packed.shape[0], packed.device)
    return times_blocks(gradient, partial(_blocks, packed, scale, zero_point, in_features, bits), in_features)


def _dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, bits: int, dtype: torch.dtype
) -> Tensor:
    _check(packed, scale, zero_point, in_features, bits)
    weight_blocks = _blocks(packed, scale, zero_point, in_features, bits, dtype)
    return joined(weight_blocks, packed, packed.shape[0], in_features, dtype)


def _blocks(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, bits: int, dtype: torch.dtype
) -> Blocks:
    zeros = unpack_zeros(zero_point, packed.shape[0], bits)
    for first in range(0, packed.shape[0], BLOCK_CHANNELS):
        span = slice(first, min(first + BLOCK_CHANNELS, packed.shape[0]))
        own_zeros = None if zeros is None else zeros[span]
        yield span, dequantize_rows(packed[span], scale[span], own_zeros, in_features, bits, dtype)


def _check(packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, bits: int) -> None:
    """Raises a ValueError unless dtypes and sizes of the tensors are those of one linear."""
    out_features = packed.shape[0]
    n = scale.shape[-1]
    expected = {
        "packed": (packed, (out_features, words_for(in_features, bits)), torch.int32),
        "scale": (scale, (out_features, n), scale.dtype if scale.is_floating_point() else torch.float16),
    }
    if zero_point is not None:
        expected["zero_point"] = (zero_point, (words_for(out_features, bits), n), torch.int32)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape} for {in_features} input "
                f"channels of {bits} bits."
            )
    if not n or in_features % n:
        raise ValueError(f"scale is {tuple(scale.shape)}; expected groups that divide {in_features} input channels.")


for _name, _kernel in (("linear", _linear), ("linear_back", _linear_back), ("dequantize", _dequantize)):
    _library.impl(f"{_name}_pack_quantized", _kernel, "CompositeExplicitAutograd")

_ops = torch.ops.hf_awq_offload


@torch.library.register_fake(f"{NAMESPACE}::linear_pack_quantized", lib=_library)
def _(x, packed, scale, zero_point, bits):
    _check(packed, scale, zero_point, x.shape[-1], bits)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::linear_back_pack_quantized", lib=_library)
def _(gradient, packed, scale, zero_point, in_features, bits):
    return gradient.new_empty(*gradient.shape[:-1], in_features)


@torch.library.register_fake(f"{NAMESPACE}::dequantize_pack_quantized", lib=_library)
def _(packed, scale, zero_point, in_features, bits, dtype):
    return packed.new_empty(packed.shape[0], in_features, dtype=dtype)


def _keep_packed(ctx, inputs, output) -> None:
    x, packed, scale, zero_point, bits = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.in_features, ctx.bits = x.shape[-1], bits


def _linear_backward(ctx, grad_output: Tensor):
    gradient = _ops.linear_back_pack_quantized(grad_output, *ctx.saved_tensors, ctx.in_features, ctx.bits)
    return gradient, None, None, None, None


def _keep_packed_back(ctx, inputs, output) -> None:
    _, packed, scale, zero_point, _, bits = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.bits = bits


def _linear_back_backward(ctx, grad_output: Tensor):
    """Differentiates the backward pass: it is linear in the gradient, so its gradient is the forward product."""
    return _ops.linear_pack_quantized(grad_output, *ctx.saved_tensors, ctx.bits), None, None, None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::linear_pack_quantized", _linear_backward, setup_context=_keep_packed, lib=_library
)
torch.library.register_autograd(
    f"{NAMESPACE}::linear_back_pack_quantized", _linear_back_backward, setup_context=_keep_packed_back, lib=_library
)
