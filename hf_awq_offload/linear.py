"""A linear layer whose weight is stored in the AWQ GEMM layout."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .grid import SCALE_DTYPE, Grid, resolve_group_size
from .packing import COLUMNS_PER_WORD, PackedWeight

_LAYOUT_LOCK = threading.RLock()
"""Held while a linear changes its layout, and while one must not change."""


class AwqLinear(nn.Linear):
    """y = x Wᵀ + b with W (out, in) held as AWQ words, dequantized when it is used.

    A subclass of nn.Linear, so that code which looks for linears (PEFT, Trainer, hooks) finds it. The packed tensors
    are frozen Parameters rather than buffers: accelerate offloads parameters by default, buffers not.

    Where the fastest backend wants a layout of its own (ops/backend.py), the first forward pass makes it and lets go of
    `qweight`: the parameters are then `native_words` and `native_parameters` instead. Whatever needs the AWQ words
    (reading `qweight`, saving, copying, moving, loading) brings them back first, to the bit, and the next forward pass
    packs again. At no time are both kept.

    Args:
        in_features: input channels, a multiple of the group size.
        out_features: output channels, a multiple of 8.
        bias: whether there is one; it is in the model's dtype.
        grid: bits, group size and kind of grid.
        dtype: dtype of the bias, and what `weight` is dequantized to.
        backend: one of `ops.BACKENDS`.
        device: where the (uninitialized) tensors are made.
    """

    qweight: nn.Parameter  # (in, out / 8) int32
    qzeros: nn.Parameter  # (n, out / 8) int32
    scales: nn.Parameter  # (n, out) fp16
    native_words: nn.Parameter | None
    native_parameters: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        grid: Grid,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the full-precision weight
        self.in_features = in_features
        self.out_features = out_features
        self.grid = grid
        self.dtype = dtype or torch.get_default_dtype()
        self.backend = backend
        self._native_source: tuple[Any, ...] | None = None  # what `native_parameters` were made from
        n = in_features // grid.group_size
        words = out_features // COLUMNS_PER_WORD
        self.qweight = _frozen(torch.empty(in_features, words, dtype=torch.int32, device=device))
        self.qzeros = _frozen(torch.empty(n, words, dtype=torch.int32, device=device))
        self.scales = _frozen(torch.empty(n, out_features, dtype=SCALE_DTYPE, device=device))
        self.register_parameter(
            "bias", _frozen(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None
        )
        self.register_parameter("native_words", None)
        self.register_parameter("native_parameters", None)

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
        words = self.native_words
        if words is None:
            return ops.dequantize(self.packed, self.dtype)
        name = self._native_source[0]  # type: ignore[index]
        return ops.dequantize_native(words, self.qzeros, self.scales, self.in_features, self.dtype, name)

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary linear with the same weight and bias in `dtype`, on the same device; it can be trained."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        weight = ops.dequantize(self.packed, dtype)
        dense.weight = nn.Parameter(weight.contiguous())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense.train(self.training)

    def set_scale_dtype(self, dtype: torch.dtype) -> None:
        """Before loading: hold scales as the checkpoint does, where that is not fp16."""
        self.scales = _frozen(torch.empty_like(self.scales, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the input's dtype (under autocast, in autocast's)."""
        device_type = input.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            input = input.to(torch.get_autocast_dtype(device_type))
        if not torch.compiler.is_compiling():
            self._settle_layout(input)
        words, parameters, source = self.native_words, self.native_parameters, self._native_source
        if words is None or parameters is None or source is None:
            output = ops.linear(input, self.packed, self.backend)
        else:
            native = ops.NativeWeight(words, parameters)
            output = ops.linear_native(input, native, self.qzeros, self.scales, source[0])
        return output if self.bias is None else output + self.bias.to(output.dtype)

    # -- the layout in memory --------------------------------------------------------------------------------------

    def _settle_layout(self, input: Tensor) -> None:
        """Bring the weight into the layout that the backend for `input` reads."""
        if self.scales.is_meta or input.shape[-1:] != (self.in_features,):
            return
        backend = ops.choose(self.backend, ops.Case.of(input, self.scales))
        wanted = backend.name if isinstance(backend, ops.NativeBackend) else None
        if wanted is None or self._is_offloaded():
            # For a single input that the backend refuses (fp64, say) the words are brought back, too.
            self._restore_words()
            return
        source = (wanted, *(_identity(tensor) for tensor in (self.qzeros, self.scales)))
        if self._native_source == source:
            return
        self._restore_words()
        with _LAYOUT_LOCK, torch.inference_mode(False), torch.no_grad():
            qweight = self._parameters.get("qweight")
            if qweight is None:  # another thread was faster
                return
            packed = PackedWeight(qweight, self.qzeros, self.scales)
            ops.check_packed(*packed)
            with ops.without_autocast(input.device.type):
                native = backend.pack(packed)  # type: ignore[attr-defined]
            self.native_words, self.native_parameters = _frozen(native.words), _frozen(native.parameters)
            self._native_source = source
            del self._parameters["qweight"]

    def _restore_words(self) -> None:
        """Undo `_settle_layout`: hold `qweight` again, and nothing else."""
        if self.native_words is None:
            return
        with _LAYOUT_LOCK, torch.inference_mode(False), torch.no_grad():
            if self.native_words is None or self._native_source is None:
                return
            backend = ops.native_backend(self._native_source[0])
            words = backend.unpack(self.native_words, self.in_features, self.out_features)
            # First, as in state dicts of the format. Replaced in one step: other threads may be reading the dict.
            self.__dict__["_parameters"] = {"qweight": _frozen(words)} | self._parameters
            self.native_words = self.native_parameters = self._native_source = None

    def _is_offloaded(self) -> bool:
        """Whether accelerate brings the tensors in for each forward pass: packing them would be for that one."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))

    def __getattr__(self, name: str) -> Any:
        if name != "qweight":
            return super().__getattr__(name)
        words = self._parameters.get(name)
        return self._locked_words() if words is None else words

    def _locked_words(self) -> nn.Parameter:
        with _LAYOUT_LOCK:
            if self.__dict__.get("_native_source") is not None:
                self._restore_words()
            return super().__getattr__("qweight")  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: another machine may have another layout."""
        with _LAYOUT_LOCK:
            self._restore_words()
            return self.__dict__ | {"_parameters": dict(self._parameters)}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with _LAYOUT_LOCK:
            self._restore_words()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs):
        with _LAYOUT_LOCK:
            self._restore_words()
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True):
        """A cast (`.to(dtype)`, `.half()`) concerns the bias and the dtype of `weight`; scales stay as stored."""
        with _LAYOUT_LOCK:
            self._restore_words()
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


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor is replaced, or changed in place."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
