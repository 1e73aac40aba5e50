"""Runs a module's own forward with linears in place of its fused parameters, whatever that forward looks like.

Letters: E experts, (a, b) rows and columns of one expert's slice of a fused parameter, t tokens.

A `FusedWeight` stands for the parameter. It has a shape and strides but no data. Indexing, transposing or reshaping it
gives another view, whose offset and strides tell which experts' slices it covers, and whether they are transposed. A
product of activations with such a view runs the linears of those experts; every other use raises `NotAProductError`:

    F.linear(x, self.gate_up_proj[3])  ->  self.get_submodule("3.gate_up_proj")(x)
    torch.bmm(x, self.down_proj)       ->  a stack of self.get_submodule(f"{e}.down_proj")(x[e])

So loops over experts, batched products and products of sorted tokens need no code of their own. The rejected
alternative, a forward written for each of them, would have to be chosen by the class's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from ..errors import ModelStructureError


class NotAProductError(ModelStructureError):
    """A fused parameter is used in another way than as a factor of a matrix product."""

    def __init__(self, parameter: str, use: str):
        super().__init__(f"{parameter} is used by {use}; expected products of activations and one expert's slice each.")
        self.parameter = parameter


class ExpertSlice(NamedTuple):
    """A factor of a product: one expert's slice of a fused parameter."""

    parameter: str
    expert: int
    rows: int
    columns: int
    is_transposed: bool
    """The product takes the columns of the slice, as it is stored, for output features: stored (in, out)."""


class Multiplier(Protocol):
    """What computes the products of a module's fused parameters."""

    def multiply(
        self,
        x: Tensor,  # (..., in)
        expert_slice: ExpertSlice,
    ) -> Tensor:  # (..., out)
        ...

    def compute_device(self) -> torch.device: ...


class FusedWeight(Tensor):
    """Stands for a fused parameter, or a view of one, in the forward of the module that had it."""

    multiplier: Multiplier
    parameter: str

    @classmethod
    def of(cls, multiplier: Multiplier, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> FusedWeight:
        weight = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        weight.multiplier, weight.parameter = multiplier, parameter
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' initialization skips it
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = next((value for value in (*args, *kwargs.values()) if isinstance(value, cls)), None)
        if weight is not None and func == Tensor.device.__get__:
            return weight.multiplier.compute_device()
        if func in _PRODUCTS:
            return _PRODUCTS[func](*args, **kwargs)
        with DisableTorchFunctionSubclass():
            if weight is None or func in FORM:
                return func(*args, **kwargs)
            use = getattr(func, "__name__", str(func))
            if func is Tensor.__getitem__:
                args = (args[0], _plain_index(args[1]))
            elif _writes(use) or any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
                raise NotAProductError(weight.parameter, use)
            result = func(*args, **kwargs)
            if isinstance(result, tuple | list):
                return type(result)(weight._view(part, use) for part in result)
            return weight._view(result, use)

    def _view(self, result: Any, use: str) -> Any:
        """Marks a result as a view of this parameter; what holds no tensor passes."""
        if not isinstance(result, Tensor):
            return result
        if result.untyped_storage()._cdata != self.untyped_storage()._cdata:
            raise NotAProductError(self.parameter, use)
        view = result.as_subclass(FusedWeight)
        view.multiplier, view.parameter = self.multiplier, self.parameter
        return view

    def slices(self, features_last: bool) -> list[ExpertSlice]:
        """Returns the experts' slices that this view covers, a matrix or a stack of matrices.

        Args:
            features_last: the product takes the last axis for output features: x @ W, with W (in, out).

        Raises:
            NotAProductError: the view is something else.
        """
        with DisableTorchFunctionSubclass():
            shape, stride, offset = tuple(self.shape), self.stride(), self.storage_offset()
        count = shape[0] if len(shape) == 3 else 1
        first, last = shape[-2:] if len(shape) >= 2 else (0, 0)
        size = first * last
        is_stored_so = stride[-2:] == (last, 1)
        is_whole = len(shape) in (2, 3) and (is_stored_so or stride[-2:] == (1, first))
        if not is_whole or size == 0 or offset % size or (count > 1 and stride[0] != size):
            raise NotAProductError(self.parameter, f"a product with a part of shape {shape}")
        rows, columns = (first, last) if is_stored_so else (last, first)
        is_transposed = features_last == is_stored_so
        begin = offset // size
        return [
            ExpertSlice(self.parameter, expert, rows, columns, is_transposed) for expert in range(begin, begin + count)
        ]

    def product(
        self,
        x: Tensor,  # (..., in); for a stack of n matrices (n, t, in), (1, t, in) or (t, in)
        features_last: bool,
    ) -> Tensor:
        """Returns the product of x with this view, (..., out) or (n, t, out)."""
        slices = self.slices(features_last)
        if self.ndim == 2:
            return self.multiplier.multiply(x, slices[0])
        if isinstance(x, FusedWeight) or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] not in (1, len(slices))):
            raise NotAProductError(self.parameter, f"a product with activations of shape {tuple(x.shape)}")
        stacked = x.expand(len(slices), *x.shape[-2:])
        return torch.stack([self.multiplier.multiply(stacked[index], part) for index, part in enumerate(slices)])


def _writes(function_name: str) -> bool:
    return function_name == "__setitem__" or (function_name.endswith("_") and not function_name.endswith("__"))


def _plain_index(index: Any) -> Any:
    """Returns an index without 0-dimensional tensors, which would make it a copy on some devices."""
    if isinstance(index, tuple):
        return tuple(map(_plain_index, index))
    is_number = isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()
    return int(index) if is_number and index.dtype != torch.bool else index


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, FusedWeight) or isinstance(input, FusedWeight) or isinstance(bias, FusedWeight):
        raise NotAProductError(_named(input, weight, bias), "linear")
    output = weight.product(input, features_last=False)
    return output if bias is None else output + bias


def _matmul(first: Tensor, second: Tensor) -> Tensor:
    if isinstance(first, FusedWeight) == isinstance(second, FusedWeight):
        raise NotAProductError(_named(first, second), "a product of two weights")
    if isinstance(second, FusedWeight):
        return second.product(first, features_last=True)
    assert isinstance(first, FusedWeight)
    if second.ndim == 1:
        return first.product(second.unsqueeze(0), features_last=False).squeeze(-2)
    return first.product(second.mT, features_last=False).mT


def _reflected_matmul(second: Tensor, first: Tensor) -> Tensor:
    return _matmul(first, second)


def _addmm(bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, FusedWeight):
        raise NotAProductError(bias.parameter, "addmm")
    return beta * bias + alpha * _matmul(first, second)


def _einsum(equation: str, *operands: Any) -> Tensor:
    """Computes an einsum of activations and one view, which sums over one axis."""
    factors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else list(operands)
    terms, arrow, output = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    weights = [index for index, factor in enumerate(factors) if isinstance(factor, FusedWeight)]
    if len(factors) != 2 or len(weights) != 1 or not arrow or "." in equation:
        raise NotAProductError(_named(*factors), f"einsum {equation}")
    weight, x = factors[weights[0]], factors[1 - weights[0]]
    of_weight, of_x = letters[weights[0]], letters[1 - weights[0]]
    summed = [letter for letter in of_weight[-2:] if letter in of_x and letter not in output]
    made = [letter for letter in of_weight[-2:] if letter not in of_x and letter in output]
    stacked = of_weight[:-2]
    if len(summed) != 1 or len(made) != 1 or len(stacked) > 1 or (stacked and stacked not in output):
        raise NotAProductError(weight.parameter, f"einsum {equation}")
    slices = weight.slices(features_last=of_weight[-1] == made[0])
    outputs = []
    for index, part in enumerate(slices):
        is_stacked = bool(stacked) and stacked in of_x
        own = x.select(of_x.index(stacked), index) if is_stacked else x
        own_letters = of_x.replace(stacked, "") if is_stacked else of_x
        axis = own_letters.index(summed[0])
        product = weight.multiplier.multiply(own.movedim(axis, -1), part)
        now = own_letters.replace(summed[0], "") + made[0]
        outputs.append(product.permute([now.index(letter) for letter in output if letter != stacked]))
    return torch.stack(outputs, output.index(stacked)) if stacked else outputs[0]


def _named(*values: Any) -> str:
    return next(value.parameter for value in values if isinstance(value, FusedWeight))


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: _linear,
    torch.einsum: _einsum,
    **dict.fromkeys((torch.addmm, torch.baddbmm), _addmm),
    Tensor.__rmatmul__: _reflected_matmul,
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _matmul
    ),
}

FORM = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "ndim", "layout", "is_meta", "requires_grad", "grad", "is_cuda", "is_sparse")
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.stride,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    Tensor.element_size,
    Tensor.__len__,
}
"""Uses of a parameter that read nothing but its form."""
