"""The dequantized weight that callers read: writing to it raises, so that no change is lost silently.

Each access to a quantized linear's `weight` computes it again and would lose what was written to it before. Code that
merges adapters (`layer.weight.data += delta`), initializes or prunes writes to weights; each such write raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import QuantizedWeightError

_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul")
) | {"__setitem__"}


class DequantizedWeight(Tensor):
    """A read-only dequantized weight; tensors that share its memory (`.data`, `.t()`, slices) are read-only too.

    Results with memory of their own (`.clone()`, `weight + 1`) are plain tensors.
    """

    _is_hf_initialized = True  # keeps transformers from initializing it as missing in the checkpoint

    @classmethod
    def of(
        cls,
        weight: Tensor,  # (out, in)
    ) -> DequantizedWeight:
        return weight.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_write(func, args, kwargs):
            raise QuantizedWeightError(
                "The weight of a quantized linear is stored in few bits, and `weight` is a copy in the model's dtype: "
                f"{getattr(func, '__name__', func)} would change the copy and be lost. To merge adapters other than "
                "LoRA, train every weight or edit weights, call model.dequantize() first (quantize_model makes it AWQ "
                "again). Expected: reading only, or a clone()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, tuple | list):  # from split(), chunk() and others
            return type(result)(_guarded(part, args) for part in result) if type(result) in (tuple, list) else result
        return _guarded(result, args)


def _is_write(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `func` would change a dequantized weight among its arguments."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute == "data" or (attribute == "requires_grad" and bool(args[1]))
    if name == "requires_grad_":
        return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    changes_first = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    first = args[0] if args else next(iter(kwargs.values()), None)
    if changes_first and isinstance(first, DequantizedWeight):
        return True
    return isinstance(kwargs.get("out"), DequantizedWeight)


def _guarded(result: Any, args: tuple) -> Any:
    if isinstance(result, Tensor) and any(_shares_memory(result, argument) for argument in args):
        return result.as_subclass(DequantizedWeight)
    return result


def _shares_memory(result: Tensor, argument: Any) -> bool:
    return (
        isinstance(argument, DequantizedWeight)
        and not result.is_meta
        and result.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
    )
