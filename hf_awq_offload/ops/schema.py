"""Defines the custom ops, through which the compiler, autograd and the dispatcher see a product with a packed weight.

    linear(x, qweight, qzeros, scales, backend)                         x Wᵀ: (…, K) -> (…, N)
    linear_back(gradient, qweight, qzeros, scales, backend)             the gradient of x, gradient W: (…, N) -> (…, K)
    dequantize(qweight, qzeros, scales, dtype, backend)                 W: (N, K)

    linear_native(x, words, parameters, qzeros, scales, backend)        as above, with a backend's own layout
    linear_back_native(gradient, words, qzeros, scales, in_features, backend)
    dequantize_native(words, qzeros, scales, in_features, dtype, backend)

Only x gets a gradient; the backward pass dequantizes again, block by block, and only the packed tensors are saved for
it. AWQ tensors come from files, so sizes are checked before a kernel gets a pointer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch
from torch import Tensor

from ..formats.awq import COLUMNS_PER_WORD, PackedWeight
from .backend import Backend, LinearShape, NativeBackend, NativeWeight, WordsBackend
from .blocks import BlocksIn, multiply_blocks_back
from .dispatch import backend_named, choose, dequantizer

NAMESPACE = "hf_awq_offload"
_library = torch.library.Library(NAMESPACE, "DEF")

_PACKED = "Tensor qweight, Tensor qzeros, Tensor scales"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
for _schema in (
    f"linear(Tensor x, {_PACKED}, str backend) -> Tensor",
    f"linear_back(Tensor gradient, {_PACKED}, str backend) -> Tensor",
    "linear_native(Tensor x, Tensor words, Tensor parameters, Tensor qzeros, Tensor scales, str backend) -> Tensor",
    "linear_back_native(Tensor gradient, Tensor words, Tensor qzeros, Tensor scales, int in_features, str backend) "
    "-> Tensor",
    f"dequantize({_PACKED}, ScalarType dtype, str backend) -> Tensor",
    "dequantize_native(Tensor words, Tensor qzeros, Tensor scales, int in_features, ScalarType dtype, str backend) "
    "-> Tensor",
):
    _library.define(_schema, tags=_TAGS)


def _linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    backend: str,
    chosen: Backend | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    check_packed(qweight, qzeros, scales)
    check_input(x, qweight.shape[0], qweight.device)
    if bias is not None:
        check_bias(bias, scales.shape[1], qweight.device)
    chosen = chosen or choose(backend, LinearShape.of(x, scales))
    if not isinstance(chosen, WordsBackend):  # the weight is not in the backend's own layout, as under torch.compile
        chosen = backend_named("torch")
    assert isinstance(chosen, WordsBackend)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return _output_like(x, scales)
    with without_autocast(x.device.type):
        packed = PackedWeight(qweight, qzeros, scales)
        output = chosen.linear(rows, packed) if bias is None else chosen.biased_linear(rows, packed, bias)
    return _unflatten(output, x)


def _linear_back(gradient: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, backend: str) -> Tensor:
    check_packed(qweight, qzeros, scales)
    check_input(gradient, scales.shape[1], qweight.device)
    packed = PackedWeight(qweight, qzeros, scales)
    return times_blocks(
        gradient, lambda dtype: _dequantizer(packed, dtype, backend).blocks(packed, dtype), qweight.shape[0]
    )


def _linear_native(
    x: Tensor, words: Tensor, parameters: Tensor, qzeros: Tensor, scales: Tensor, backend: str
) -> Tensor:
    check_groups(x.shape[-1], qzeros, scales)
    chosen = native_backend(backend)
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return _output_like(x, scales)
    with without_autocast(x.device.type):
        output = chosen.linear(rows, NativeWeight(words, parameters), qzeros, scales)
    return _unflatten(output, x)


def _linear_back_native(
    gradient: Tensor, words: Tensor, qzeros: Tensor, scales: Tensor, in_features: int, backend: str
) -> Tensor:
    check_groups(in_features, qzeros, scales)
    check_input(gradient, scales.shape[1], scales.device)
    weight = partial(native_backend(backend).blocks, words, qzeros, scales, in_features)
    return times_blocks(gradient, weight, in_features)


def _dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    check_packed(qweight, qzeros, scales)
    packed = PackedWeight(qweight, qzeros, scales)
    return _dequantizer(packed, dtype, backend).dequantize(packed, dtype)


def _dequantize_native(
    words: Tensor, qzeros: Tensor, scales: Tensor, in_features: int, dtype: torch.dtype, backend: str
) -> Tensor:
    check_groups(in_features, qzeros, scales)
    return native_backend(backend).dequantize(words, qzeros, scales, in_features, dtype)


for _name, _kernel in (
    ("linear", _linear),
    ("linear_back", _linear_back),
    ("linear_native", _linear_native),
    ("linear_back_native", _linear_back_native),
    ("dequantize", _dequantize),
    ("dequantize_native", _dequantize_native),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")

_ops = torch.ops.hf_awq_offload


def linear(
    x: Tensor,  # (…, K)
    packed: PackedWeight,
    backend: str = "auto",
    chosen: Backend | None = None,  # the result of `choose`, if the caller already has it
    bias: Tensor | None = None,  # (N,)
) -> Tensor:
    """Returns x Wᵀ + bias, (…, N) in x's dtype, differentiable with respect to x and bias.

    Raises:
        ConfigError: `backend`, or the one that the environment requests, cannot serve this linear.
        ValueError: the tensors' shapes or dtypes contradict each other.
    """
    if is_unobserved(x) and not (bias is not None and bias.requires_grad and torch.is_grad_enabled()):
        return _linear(x, *packed, backend, chosen, bias)
    output = _ops.linear(x, *packed, backend)
    return output if bias is None else output + bias.to(output.dtype)


def is_unobserved(x: Tensor) -> bool:
    """Returns whether an op's kernel can be called directly: no gradient, compiler, tracer, mode or subclass is active.

    Going through the dispatcher and back to Python takes as long as a product of 2048 × 2048 with one row.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch.jit.is_tracing()
    )


def linear_native(x: Tensor, native: NativeWeight, qzeros: Tensor, scales: Tensor, backend: str) -> Tensor:
    """Does what `linear` does, with a weight in the layout of `backend`."""
    return _ops.linear_native(x, native.words, native.parameters, qzeros, scales, backend)


def dequantize(packed: PackedWeight, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """Returns the weight, (N, K) in `dtype`; (q - z) · Δ is computed in fp32 and rounded once."""
    return _ops.dequantize(*packed, dtype, backend)


def dequantize_native(
    words: Tensor, qzeros: Tensor, scales: Tensor, in_features: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Does what `dequantize` does, with a weight in the layout of `backend`."""
    return _ops.dequantize_native(words, qzeros, scales, in_features, dtype, backend)


def native_backend(name: str) -> NativeBackend:
    """Returns the backend `name`, which must have a layout of its own."""
    backend = backend_named(name)
    assert isinstance(backend, NativeBackend), name
    return backend


def without_autocast(device_type: str) -> AbstractContextManager:
    """Disables autocast, so that ops compute in the dtypes that a backend chooses."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def autocasts(device_type: str) -> bool:
    """Returns whether autocast is enabled for the type of device."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


_has_autocast = cache(torch.amp.is_autocast_available)  # torch takes longer for the answer than for the whole question


# -- checks ----------------------------------------------------------------------------------------------------------


def check_packed(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> None:
    """Raises a ValueError unless the three tensors form one linear: dtypes, sizes, and one device."""
    if qweight.dtype != torch.int32 or qweight.ndim != 2:
        raise ValueError(f"qweight is {_describe(qweight)}; expected int32 (in, out / 8).")
    check_groups(qweight.shape[0], qzeros, scales)
    if qweight.shape[1] * COLUMNS_PER_WORD != scales.shape[1]:
        raise ValueError(
            f"qweight is {_describe(qweight)} and scales {_describe(scales)}; expected 8 columns of scales per word."
        )
    if not qweight.device == qzeros.device == scales.device:
        raise ValueError(
            f"qweight, qzeros and scales are on {qweight.device}, {qzeros.device} and {scales.device}; expected one "
            "device."
        )


def check_groups(in_features: int, qzeros: Tensor, scales: Tensor) -> None:
    """Raises a ValueError unless zero points and scales have matching shapes that divide `in_features` into groups."""
    if not scales.is_floating_point() or scales.ndim != 2 or not scales.shape[0] or in_features % scales.shape[0]:
        raise ValueError(
            f"scales are {_describe(scales)}; expected floating point (in / group_size, out), in being {in_features}."
        )
    if qzeros.dtype != torch.int32 or qzeros.ndim != 2 or qzeros.shape[0] != scales.shape[0]:
        raise ValueError(f"qzeros are {_describe(qzeros)}; expected int32 ({scales.shape[0]}, out / 8).")
    if qzeros.shape[1] * COLUMNS_PER_WORD != scales.shape[1]:
        raise ValueError(
            f"qzeros are {_describe(qzeros)} and scales {_describe(scales)}; expected 8 columns of scales per word."
        )


def check_input(x: Tensor, features: int, device: torch.device) -> None:
    """Raises a ValueError unless x is floating point (…, features) on the weight's device, as kernels assume."""
    if not x.is_floating_point() or not x.ndim or x.shape[-1] != features:
        raise ValueError(f"The input is {_describe(x)}; expected floating point (…, {features}).")
    if x.device != device:
        raise ValueError(f"The input is on {x.device}, the weight on {device}; expected one device.")


def check_bias(bias: Tensor, features: int, device: torch.device) -> None:
    """Raises a ValueError unless the bias is floating point (features,) on the weight's device."""
    if not bias.is_floating_point() or bias.shape != (features,):
        raise ValueError(f"The bias is {_describe(bias)}; expected floating point ({features},).")
    if bias.device != device:
        raise ValueError(f"The bias is on {bias.device}, the weight on {device}; expected one device.")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _unflatten(
    output: Tensor,  # (M, N)
    x: Tensor,  # (…, K)
) -> Tensor:
    """Reshapes to (…, N) in place, because autograd must not take the result for a view; callers may add to it."""
    return output if x.ndim == 2 else output.resize_(*x.shape[:-1], output.shape[1])


def _output_like(x: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _dequantizer(packed: PackedWeight, dtype: torch.dtype, backend: str) -> WordsBackend:
    (in_features, _), (n, out_features) = packed.qweight.shape, packed.scales.shape
    return dequantizer(backend, LinearShape(packed.scales.device, dtype, in_features, out_features, in_features // n))


def times_blocks(
    gradient: Tensor,  # (…, N)
    weight: BlocksIn,
    in_features: int,
) -> Tensor:
    """Returns `gradient` W, (…, K) in the dtype of `gradient`."""
    with without_autocast(gradient.device.type):
        rows = multiply_blocks_back(gradient.reshape(-1, gradient.shape[-1]), weight, in_features)
    return _unflatten(rows, gradient)


# -- what the compiler sees ------------------------------------------------------------------------------------------


@torch.library.register_fake(f"{NAMESPACE}::linear", lib=_library)
def _(x, qweight, qzeros, scales, backend):
    check_packed(qweight, qzeros, scales)
    check_input(x, qweight.shape[0], qweight.device)
    return _output_like(x, scales)


@torch.library.register_fake(f"{NAMESPACE}::linear_back", lib=_library)
def _(gradient, qweight, qzeros, scales, backend):
    return gradient.new_empty(*gradient.shape[:-1], qweight.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::linear_native", lib=_library)
def _(x, words, parameters, qzeros, scales, backend):
    return _output_like(x, scales)


@torch.library.register_fake(f"{NAMESPACE}::linear_back_native", lib=_library)
def _(gradient, words, qzeros, scales, in_features, backend):
    return gradient.new_empty(*gradient.shape[:-1], in_features)


@torch.library.register_fake(f"{NAMESPACE}::dequantize", lib=_library)
def _(qweight, qzeros, scales, dtype, backend):
    return scales.new_empty(scales.shape[1], qweight.shape[0], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::dequantize_native", lib=_library)
def _(words, qzeros, scales, in_features, dtype, backend):
    return scales.new_empty(scales.shape[1], in_features, dtype=dtype)


# -- gradients -------------------------------------------------------------------------------------------------------


def _keep_packed(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.backend = inputs[4]


def _linear_backward(ctx, grad_output: Tensor):
    return _ops.linear_back(grad_output, *ctx.saved_tensors, ctx.backend), None, None, None, None


def _linear_back_backward(ctx, grad_output: Tensor):
    """Differentiates the backward pass: it is linear in the gradient, so its gradient is the forward product."""
    return _ops.linear(grad_output, *ctx.saved_tensors, ctx.backend), None, None, None, None


def _keep_native(ctx, inputs, output) -> None:
    x, words, _, qzeros, scales, backend = inputs
    ctx.save_for_backward(words, qzeros, scales)
    ctx.in_features, ctx.backend = x.shape[-1], backend


def _linear_native_backward(ctx, grad_output: Tensor):
    gradient = _ops.linear_back_native(grad_output, *ctx.saved_tensors, ctx.in_features, ctx.backend)
    return gradient, None, None, None, None, None


def _keep_native_back(ctx, inputs, output) -> None:
    _, words, qzeros, scales, in_features, backend = inputs
    ctx.save_for_backward(words, qzeros, scales)
    ctx.in_features, ctx.backend = in_features, backend


def _linear_back_native_backward(ctx, grad_output: Tensor):
    weight = _ops.dequantize_native(*ctx.saved_tensors, ctx.in_features, grad_output.dtype, ctx.backend)
    return grad_output @ weight.t(), None, None, None, None, None


for _name, _backward, _keep in (
    ("linear", _linear_backward, _keep_packed),
    ("linear_back", _linear_back_backward, _keep_packed),
    ("linear_native", _linear_native_backward, _keep_native),
    ("linear_back_native", _linear_back_native_backward, _keep_native_back),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_keep, lib=_library)
