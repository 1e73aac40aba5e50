"""A linear layer whose weight is stored in the AWQ GEMM layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .grid import SCALE_DTYPE, Grid, resolve_group_size
from .packing import COLUMNS_PER_WORD, PackedWeight, unpack_weight


class AwqLinear(nn.Linear):
    """y = x Wᵀ + b with W (out, in) held as AWQ words, dequantized when it is used.

    A subclass of nn.Linear, so that code which looks for linears (PEFT, Trainer, hooks) finds it. The packed tensors
    are frozen Parameters rather than buffers: accelerate offloads parameters by default, buffers not.

    Args:
        in_features: input channels, a multiple of the group size.
        out_features: output channels, a multiple of 8.
        bias: whether there is one; it is in the model's dtype.
        grid: bits, group size and kind of grid.
        dtype: dtype of the bias, and what `weight` is dequantized to.
        device: where the (uninitialized) tensors are made.
    """

    qweight: nn.Parameter  # (in, out / 8) int32
    qzeros: nn.Parameter  # (n, out / 8) int32
    scales: nn.Parameter  # (n, out) fp16

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
        n = in_features // grid.group_size
        words = out_features // COLUMNS_PER_WORD
        self.qweight = _frozen(torch.empty(in_features, words, dtype=torch.int32, device=device))
        self.qzeros = _frozen(torch.empty(n, words, dtype=torch.int32, device=device))
        self.scales = _frozen(torch.empty(n, out_features, dtype=SCALE_DTYPE, device=device))
        self.register_parameter(
            "bias", _frozen(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None
        )

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None,  # (out,)
        grid: Grid,
        dtype: torch.dtype,
    ) -> AwqLinear:
        """A linear around tensors that exist; nothing is copied."""
        in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
        linear = cls(in_features, out_features, bias is not None, grid, dtype, device="meta")
        for name, tensor in packed._asdict().items():
            setattr(linear, name, _frozen(tensor))
        if bias is not None:
            linear.bias = _frozen(bias.detach().to(dtype))
        return linear

    @property
    def packed(self) -> PackedWeight:
        """The stored tensors."""
        return PackedWeight(self.qweight, self.qzeros, self.scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, (out, in) in the model's dtype, made anew at each access: changing it is in vain."""
        return unpack_weight(self.packed, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the input's dtype (under autocast, in autocast's)."""
        device_type = input.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            input = input.to(torch.get_autocast_dtype(device_type))
        output = _DequantizedMatmul.apply(input, *self.packed)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _apply(self, fn, recurse: bool = True):
        """A cast (`.to(dtype)`, `.half()`) concerns the bias and the dtype of `weight`; scales stay as stored."""
        scales = self.scales.data
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales.data = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def reset_parameters(self) -> None:
        """Nothing to initialize: the tensors come from a checkpoint or from quantization."""

    def extra_repr(self) -> str:
        kind = "asymmetric" if self.grid.zero_point else "symmetric"
        return f"{super().extra_repr()}, bits={self.grid.bits}, group_size={self.grid.group_size}, {kind}"


class _DequantizedMatmul(torch.autograd.Function):
    """x Wᵀ that keeps only the packed weight for the backward pass and dequantizes it again there."""

    @staticmethod
    def forward(ctx, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(qweight, qzeros, scales)
        return nn.functional.linear(x, unpack_weight(PackedWeight(qweight, qzeros, scales), x.dtype))

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        packed = PackedWeight(*ctx.saved_tensors)
        return grad_output @ unpack_weight(packed, grad_output.dtype), None, None, None


def unpackable_reason(
    in_features: int,
    out_features: int,
    group_size: int,  # as configured, -1 allowed
) -> str | None:
    """Why a linear of this shape can't be stored in the AWQ layout, or None when it can."""
    group_size = resolve_group_size(group_size, in_features)
    if in_features % group_size:
        return f"in_features {in_features} is not a multiple of the group size {group_size}"
    if out_features % COLUMNS_PER_WORD:
        return f"out_features {out_features} is not a multiple of {COLUMNS_PER_WORD}"
    return None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
