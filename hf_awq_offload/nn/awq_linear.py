"""A linear layer that holds its weight in the AWQ GEMM format."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import QuantizedWeightError
from ..formats.awq import COLUMNS_PER_WORD, PackedWeight, pack_weight
from ..formats.grid import Grid, GroupParameters
from ..formats.layouts import AWQ_NAMES, GEMM
from .quantized_linear import QuantizedLinear, frozen

_LAYOUT_LOCK = threading.RLock()
"""Held while a linear changes the layout of its weight, and while none may."""


class AwqLinear(QuantizedLinear):
    """A linear in the AWQ GEMM format, with a multiple of 8 output channels.

    Some backends read a layout of their own (ops/backend.py). If the fastest one does, the first forward pass converts
    the weight and releases `qweight`; the parameters are then `native_words` and `native_parameters` instead. Whatever
    needs the AWQ words (reading `qweight`, saving, copying, moving, loading) restores them first, to the bit, and the
    next forward pass converts again. The linear never keeps both.

    `backend` is one of `ops.BACKENDS`; for the other arguments see `QuantizedLinear`.
    """

    FORMAT, NAMES = GEMM, AWQ_NAMES

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
        super().__init__(in_features, out_features, bias, grid, dtype, device)
        self.backend = backend
        # The backend, and the tensors that `native_parameters` were made from.
        self._native_source: tuple[Any, ...] | None = None
        self._captured = False  # whether a CUDA graph reads the native tensors
        self._read_by_graphs: list[Any] = []  # released native tensors that CUDA graphs go on reading
        self.register_parameter("native_words", None)
        self.register_parameter("native_parameters", None)

    @classmethod
    def from_codes(
        cls, codes: Tensor, parameters: GroupParameters, bias: Tensor | None, grid: Grid, dtype: torch.dtype
    ) -> AwqLinear:
        return cls.from_packed(pack_weight(codes, parameters), bias, grid, dtype)

    @classmethod
    def unpackable_reason(cls, in_features: int, out_features: int, group_size: int) -> str | None:
        reason = super().unpackable_reason(in_features, out_features, group_size)
        if reason is None and out_features % COLUMNS_PER_WORD:
            return f"out_features {out_features} is not a multiple of {COLUMNS_PER_WORD}"
        return reason

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None,  # (out,)
        grid: Grid,
        dtype: torch.dtype,
    ) -> AwqLinear:
        """Builds a linear from existing tensors, without a copy."""
        in_features, out_features = packed.qweight.shape[0], packed.scales.shape[1]
        linear = cls(in_features, out_features, bias is not None, grid, dtype, device="meta")
        linear._hold(packed._asdict(), bias)
        return linear

    @property
    def packed(self) -> PackedWeight:
        """The tensors in AWQ words; restores them if a backend's own layout is held."""
        held: dict[str, Any] = self._parameters
        qweight = held.get("qweight")
        return PackedWeight(self.qweight if qweight is None else qweight, held["qzeros"], held["scales"])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        words = self.native_words
        if words is None:
            return ops.dequantize(self.packed, dtype, self.backend)
        name = self._native_source[0]  # type: ignore[index]
        return ops.dequantize_native(words, self.qzeros, self.scales, self.in_features, dtype, name)

    def product(self, input: Tensor) -> Tensor:
        backend = None if torch.compiler.is_compiling() else self._backend_for(input)
        if backend is not None:
            self._settle_layout(backend)
        held: dict[str, Any] = self._parameters  # a module's attributes are slower to read
        words, parameters, source = held["native_words"], held["native_parameters"], self._native_source
        bias = held["bias"]
        if words is None or parameters is None or source is None:
            return ops.linear(input, self.packed, self.backend, backend, bias)
        if words.is_cuda and _is_captured():
            self._captured = True
        native = ops.NativeWeight(words, parameters)
        output = ops.linear_native(input, native, held["qzeros"], held["scales"], source[0])
        return output if bias is None else output + bias.to(output.dtype)

    # -- the layout in memory --------------------------------------------------------------------------------------

    def _backend_for(self, input: Tensor) -> ops.Backend | None:
        """The backend for this input, or None if the product will fail; its error then says why."""
        scales: Tensor = self._parameters["scales"]  # type: ignore[assignment]
        if scales.is_meta or input.shape[-1:] != (self.in_features,):
            return None
        return ops.choose(self.backend, ops.LinearShape.of(input, scales))

    def _settle_layout(self, backend: ops.Backend) -> None:
        """Converts the weight to the layout that `backend` reads."""
        wanted = backend.name if isinstance(backend, ops.NativeBackend) else None
        if wanted is None or self.is_offloaded:
            # This also restores the words for a single input that the native backend refuses, such as fp64.
            if self._parameters["native_words"] is not None:
                self._refuse_in_capture()
                self._restore_words()
            return
        source = (wanted, *(_identity(tensor) for tensor in (self.qzeros, self.scales)))
        if self._native_source == source:
            return
        self._refuse_in_capture()
        self._restore_words()
        with _LAYOUT_LOCK, torch.inference_mode(False), torch.no_grad():
            qweight = self._parameters.get("qweight")
            if qweight is None:  # another thread was faster
                return
            packed = PackedWeight(qweight, self.qzeros, self.scales)
            ops.check_packed(*packed)
            with ops.without_autocast(qweight.device.type):
                native = ops.native_backend(wanted).pack(packed)
            self.native_words, self.native_parameters = frozen(native.words), frozen(native.parameters)
            self._native_source = source
            del self._parameters["qweight"]

    def _restore_words(self) -> None:
        """Undoes `_settle_layout`: holds `qweight` again and releases the native layout."""
        if self._parameters["native_words"] is None:
            return
        with _LAYOUT_LOCK, torch.inference_mode(False), torch.no_grad():
            if self.native_words is None or self._native_source is None:
                return
            backend = ops.native_backend(self._native_source[0])
            words = backend.unpack(self.native_words, self.in_features, self.out_features)
            # qweight comes first, as in the format's state dicts. One assignment, because other threads may be reading.
            self.__dict__["_parameters"] = {"qweight": frozen(words)} | self._parameters
            if self._captured:
                self._read_by_graphs += [self.native_words, self.native_parameters]
                self._captured = False
            self.native_words = self.native_parameters = self._native_source = None

    def _refuse_in_capture(self) -> None:
        """Raises if a graph would record a change of layout: every replay would read memory that is released here."""
        if self.scales.is_cuda and _is_captured():
            raise QuantizedWeightError(
                f"A CUDA graph is being captured, and a quantized linear of {self.in_features} to {self.out_features} "
                "channels has yet to bring its weight into the layout that its kernel reads. Expected: a forward pass "
                "before the capture, with inputs of the same shape and dtype."
            )

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
        """Copies and pickles hold AWQ words: another machine may choose another layout."""
        with _LAYOUT_LOCK:
            self._restore_words()
            own = {"_parameters": dict(self._parameters), "_captured": False, "_read_by_graphs": []}
            return self.__dict__ | own

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with _LAYOUT_LOCK:
            self._restore_words()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs):
        with _LAYOUT_LOCK:
            self._restore_words()
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True):
        with _LAYOUT_LOCK:
            self._restore_words()
            return super()._apply(fn, recurse)


def _is_captured() -> bool:
    """Returns whether a CUDA graph records what runs now."""
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _identity(tensor: Tensor) -> tuple[int, int]:
    """A value that changes when the tensor is replaced or changed in place."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def choose_backend(model: nn.Module, backend: str) -> None:
    """Sets what computes the AWQ linears of a model: one of `ops.BACKENDS`."""
    for module in model.modules():
        if isinstance(module, AwqLinear):
            module.backend = backend
