"""Lets a layer compute in fp32 while its weights stay in their dtype: a parameter is cast whenever it is read.

For the time of a forward pass, every module's table of parameters is replaced by one whose entries are made on reading.
So no more exists in fp32 than the parameters of the operation at hand, scaled if the caller says so; a copy of the
whole layer would take twice the memory of one in bf16. It does not matter which module reads a parameter: attention
that multiplies by a linear's weight itself gets what the linear's own forward gets. Casting bf16 and fp16 to fp32 is
exact, so this computes the same bits as a layer that was cast as a whole.

Experts that stay fused in one parameter are read slice by slice: a slice is cast, not the stack.

On a CPU, allocating memory for a cast takes longer than the product that it is for; there, casts may be kept. Even so,
scaled parameters are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from .expert_products import FORM
from .scalings import Scaling, Scalings, scaled

Casts = dict[Tensor, Tensor]
"""Parameter -> its cast, which is kept."""


@contextmanager
def parameters_in_fp32(
    layer: nn.Module, scalings: Scalings, as_they_are: Collection[str], casts: Casts | None = None
) -> Iterator[None]:
    """Inside, whoever reads a floating-point parameter of `layer` gets an fp32 tensor of its own, scaled.

    Args:
        layer: the layer; its parameters do not change.
        scalings: by the parameter's name in the layer.
        as_they_are: parameters that are not cast.
        casts: takes the casts, to be used again; None: none is kept.
    """
    named: dict[nn.Module, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module_name, module in layer.named_modules(remove_duplicate=False):
        for key in vars(module).get("_parameters", ()):
            named[module][key].append(f"{module_name}.{key}" if module_name else key)
    tables = {module: module._parameters for module in named}
    try:
        for module, keys in named.items():
            by_key = {key: [s for name in names for s in scalings.get(name, ())] for key, names in keys.items()}
            kept = {key for key, names in keys.items() if any(name in as_they_are for name in names)}
            module._parameters = _CastOnReading(tables[module], by_key, kept, casts)
        yield
    finally:
        for module, table in tables.items():
            module._parameters = table


class _CastOnReading(dict[str, Any]):
    """A module's parameters by name, of which every reader gets an fp32 tensor of its own."""

    def __init__(self, table: dict[str, Any], scalings: Scalings, as_they_are: Collection[str], casts: Casts | None):
        super().__init__(table)
        self._scalings, self._as_they_are, self._casts = scalings, as_they_are, casts

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if not isinstance(parameter, Tensor) or not parameter.is_floating_point() or name in self._as_they_are:
            return parameter
        scalings, value = self._scalings.get(name, ()), parameter.detach()
        if self._casts is not None:
            if parameter not in self._casts:
                self._casts[parameter] = in_fp32(value)
            value = self._casts[parameter]
        if is_stack(value) and (scalings or value.dtype != torch.float32):
            return _StackInFp32.of(value, scalings)
        return in_fp32(value, scalings)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - dict.get reads past __getitem__

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # defined here, so that dict(table) and {**table} read through __getitem__

    def values(self) -> Any:
        return (self[name] for name in list(self))

    def items(self) -> Any:
        return ((name, self[name]) for name in list(self))

    def copy(self) -> dict[str, Any]:
        return dict(self.items())


def in_fp32(parameter: Tensor, scalings: Sequence[Scaling] = ()) -> Tensor:
    """Returns a parameter cast to fp32, then scaled; the parameter itself if neither changes it."""
    value = parameter.to(torch.float32)
    return scaled(value, scalings, in_place=value is not parameter)


def is_stack(parameter: Tensor) -> bool:
    """Returns whether a parameter may hold a matrix per expert; those of convolutions have smaller matrices."""
    return parameter.ndim == 3 and parameter.shape[0] <= min(parameter.shape[1:])


class _StackInFp32(Tensor):
    """Stands for a stack of matrices in fp32: an element is cast when it is taken, the stack where it is used whole."""

    parameter: Tensor
    scalings: Sequence[Scaling]

    @classmethod
    def of(cls, parameter: Tensor, scalings: Sequence[Scaling]) -> _StackInFp32:
        stack = torch.empty_like(parameter, dtype=torch.float32, device="meta").as_subclass(cls)
        stack.parameter, stack.scalings = parameter, scalings
        return stack

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        with DisableTorchFunctionSubclass():
            if isinstance(first, cls):
                if func in _PLACE:
                    return func(first.parameter)
                if func in FORM:
                    return func(*args, **kwargs)
                if func is Tensor.__getitem__ and (taken := first._taken(args[1])) is not None:
                    return taken
            return func(*map(_whole, args), **{name: _whole(value) for name, value in kwargs.items()})

    def _taken(self, index: Any) -> Tensor | None:
        """Returns the part of one matrix that `index` takes; None if it takes from several."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, Tensor) and first.ndim == 0 and first.dtype in (torch.int32, torch.int64):
            first = int(first)
        if not isinstance(first, int) or isinstance(first, bool):
            return None
        matrix = in_fp32(self.parameter[first], [scaling.of_element(first) for scaling in self.scalings])
        return matrix[tuple(rest)] if rest else matrix


def _whole(value: Any) -> Any:
    if isinstance(value, _StackInFp32):
        return in_fp32(value.parameter, value.scalings)
    return type(value)(map(_whole, value)) if type(value) in (tuple, list) else value


_PLACE = {getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_meta", "is_cpu", "is_xpu")}
"""Uses of a stack that ask where it is."""
