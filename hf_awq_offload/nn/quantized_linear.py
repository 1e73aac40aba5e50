"""What linears with packed weights have in common, whatever their format."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizedWeightError
from ..formats.grid import Grid, GroupParameters, resolve_group_size
from ..formats.layouts import TensorNames, tensors_of
from .dequantized_weight import DequantizedWeight


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b, where W (out, in) is held as packed integers and dequantized for each use.

    It subclasses nn.Linear, so that code which looks for linears (PEFT, Trainer, hooks) finds it. The packed tensors
    are frozen Parameters rather than buffers because accelerate offloads only parameters by default.

    Args:
        in_features: input channels, a multiple of the group size.
        out_features: output channels.
        bias: whether there is one; it has the model's dtype.
        grid: bits, group size and kind of grid.
        dtype: of the bias and of the dequantized `weight`.
        device: holds the uninitialized tensors.
    """

    FORMAT: ClassVar[str]
    """The checkpoint format whose tensors the linear holds (formats/layouts.py)."""
    NAMES: ClassVar[TensorNames]
    """Names of those tensors. The scales keep their dtype when the model is cast."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        grid: Grid,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the full-precision weight
        self.in_features = in_features
        self.out_features = out_features
        self.grid = grid
        self.dtype = dtype or torch.get_default_dtype()
        tensors = tensors_of(self.FORMAT, in_features, out_features, grid, self.dtype)
        self.scale_dtype = tensors[self.NAMES.scales].dtype
        for name, layout in tensors.items():
            self.register_parameter(name, frozen(torch.empty(layout.shape, dtype=layout.dtype, device=device)))
        self.register_parameter(
            "bias", frozen(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None
        )

    @classmethod
    @abstractmethod
    def from_codes(
        cls,
        codes: Tensor,  # (out, in), integers on the grid
        parameters: GroupParameters,  # (out, n)
        bias: Tensor | None,  # (out,)
        grid: Grid,
        dtype: torch.dtype,
    ) -> QuantizedLinear:
        """Packs a quantized weight into a linear."""

    @classmethod
    def unpackable_reason(
        cls,
        in_features: int,
        out_features: int,
        group_size: int,  # as configured, -1 allowed
    ) -> str | None:
        """Why this format can't store a linear of this shape, or None if it can."""
        group_size = resolve_group_size(group_size, in_features)
        if in_features % group_size:
            return f"in_features {in_features} is not a multiple of the group size {group_size}"
        return None

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight, contiguous (out, in) in `dtype`; (q - z) · Δ is computed in fp32 and rounded once."""

    @abstractmethod
    def product(
        self,
        input: Tensor,  # (..., in)
    ) -> Tensor:
        """x Wᵀ + b, (..., out) in the input's dtype, differentiable in the input and the bias."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (out, in) in the model's dtype. Each access computes it again; it is read-only."""
        weight = self.dequantized(self.dtype)
        return weight if torch.compiler.is_compiling() else DequantizedWeight.of(weight)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # When PEFT removes some kinds of adapters, it assigns the weight that it has just read from the linear.
        if not isinstance(value, DequantizedWeight):
            raise _refusal("be replaced")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise _refusal("be replaced")
        super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedLinear:
        """Freezing has no effect; training the stored integers is refused."""
        if requires_grad:
            raise _refusal("be trained")
        return super().requires_grad_(False)

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate loads the tensors for each forward pass."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """A trainable nn.Linear with the dequantized weight and the bias in `dtype`, on the same device."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        dense.weight = nn.Parameter(self.dequantized(dtype))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense.train(self.training)

    def set_scale_dtype(self, dtype: torch.dtype) -> None:
        """Before loading: gives the scales the checkpoint's dtype, which may not be the format's own."""
        self.scale_dtype = dtype
        setattr(self, self.NAMES.scales, frozen(torch.empty_like(self.get_parameter(self.NAMES.scales), dtype=dtype)))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the input's dtype, or under autocast in autocast's."""
        device_type = input.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            input = input.to(torch.get_autocast_dtype(device_type))
        if not torch.compiler.is_compiling():
            self._keep_scale_dtype()
        return self.product(input)

    def _apply(self, fn, recurse: bool = True):
        """A cast (`.to(dtype)`, `.half()`) changes the bias and the dtype of `weight`; the scales keep theirs."""
        before = self.get_parameter(self.NAMES.scales).data
        super()._apply(fn, recurse)
        scale = self.get_parameter(self.NAMES.scales)
        if scale.dtype != self.scale_dtype:
            scale.data = before.to(scale.device, self.scale_dtype)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._keep_scale_dtype()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _keep_scale_dtype(self) -> None:
        """Undoes a cast of the scales' data: PEFT's prepare_model_for_kbit_training makes all 16-bit parameters fp32.

        Kernels and other readers of the checkpoint expect the format's dtype. A cast to fp32 and back is exact.
        """
        scale: Any = self._parameters[self.NAMES.scales]  # get_parameter is slower than the rest of this method
        if scale.dtype != self.scale_dtype:
            scale.data = scale.data.to(self.scale_dtype)

    def reset_parameters(self) -> None:
        """Does nothing: the tensors come from a checkpoint or from quantization."""

    def extra_repr(self) -> str:
        kind = "asymmetric" if self.grid.zero_point else "symmetric"
        return f"{super().extra_repr()}, bits={self.grid.bits}, group_size={self.grid.group_size}, {kind}"

    @property
    def is_on_meta(self) -> bool:
        """Whether the tensors are on the meta device, from which accelerate loads them for each forward pass."""
        return self.get_parameter(self.NAMES.scales).is_meta

    def _hold(self, tensors: dict[str, Any], bias: Tensor | None) -> None:
        """Makes existing tensors this linear's parameters, without a copy."""
        for name, tensor in tensors.items():
            setattr(self, name, frozen(tensor))
        self.scale_dtype = tensors[self.NAMES.scales].dtype
        if bias is not None:
            self.bias = frozen(bias.detach().to(self.dtype))


def _refusal(what: str) -> QuantizedWeightError:
    return QuantizedWeightError(
        f"The weight of a quantized linear is stored in few bits and can't {what}. Train adapters instead (peft's "
        "LoraConfig, without this linear in modules_to_save), or call model.dequantize() for a model to change."
    )


def frozen(tensor: Tensor) -> nn.Parameter:
    """Wraps a tensor in a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def packed_tensors(module: nn.Module) -> frozenset[str]:
    """Names within `module` of all tensors, except biases, of its quantized linears."""
    return frozenset(
        f"{name}.{tensor}" if name else tensor
        for name, linear in module.named_modules()
        if isinstance(linear, QuantizedLinear)
        for tensor in linear.NAMES.all
    )
