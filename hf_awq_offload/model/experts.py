"""A mixture's experts as one linear per expert and projection: what calibration, search and folds see of them.

transformers 5 holds the experts of a layer fused, in parameters that span all experts. `fused_experts.py` finds such
modules and replaces them by subclasses of `UnfusedExperts`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Routing(Enum):
    """The rule that decides which tokens go through which experts."""

    TOP_K = "as the router says"
    EVERY_TOKEN = "every expert computes every token, the output is as the router says"
    UNIFORM = "every expert computes tokens whatever the router says, and all count the same in the output"


class ExpertPart(NamedTuple):
    """The position of a linear among a layer's experts."""

    experts: str  # name of the experts module, or of what holds several of one mixture, within the layer
    expert: int
    projection: str

    @property
    def family(self) -> str:
        """A name that this projection shares over all experts."""
        return ".".join(filter(None, (self.experts, "*", self.projection)))

    @property
    def expert_name(self) -> str:
        return f"{self.experts}.{self.expert}".lstrip(".")


class WithoutFused(nn.Module):
    """A copy of a module without its fused parameters.

    It has the module's attributes and binds its methods. It is not an instance of the module's class, because that
    class's initialization needs the fused parameters.
    """

    fused_class: type[nn.Module]
    was_fused: tuple[str, ...]
    """Names of the fused parameters within the module."""

    def __getattr__(self, name: str) -> Any:
        """Binds methods of the fused module to this one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__.get("was_fused", ()):
                return self._in_place_of(name)
            method = getattr(self.__dict__.get("fused_class"), name, None)
            if not inspect.isfunction(method):
                raise
            return functools.partial(method, self)

    def _in_place_of(self, name: str) -> Tensor:
        """Returns what stands for a fused parameter: enclosing blocks initialize experts under these names."""
        tensor = torch.empty(0)
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' initialization skips it
        return tensor


class UnfusedExperts(WithoutFused):
    """Experts taken apart: linears in place of the fused parameters. Expert e's are named "e" or below "e."."""

    routing: Routing
    experts_total: int

    def linears_of(self, expert: int) -> list[tuple[str, str]]:
        """Returns (name within the module, projection) of each linear of an expert."""
        raise NotImplementedError

    def taken_apart(self, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the linears' tensors, by name within the module, from those of the fused parameters.

        They are views unless the layout is transposed or interleaved.
        """
        raise NotImplementedError

    def parts(self, module_name: str) -> dict[str, ExpertPart]:
        """Returns each linear of an expert by its name in the layer; `module_name` is this module's name there."""
        return {
            f"{module_name}.{name}".lstrip("."): ExpertPart(module_name, expert, projection)
            for expert in range(self.experts_total)
            for name, projection in self.linears_of(expert)
        }


def without_fused(module: nn.Module, names: Collection[str], new_class: type[WithoutFused]) -> Any:
    """Returns a shallow copy, of class `new_class`, without some of the module's direct parameters."""
    result = copy.copy(module)
    result.__class__ = new_class
    assert isinstance(result, WithoutFused)
    result.fused_class = type(module)
    result._parameters = {name: value for name, value in module._parameters.items() if name not in names}
    result._modules = dict(module._modules)
    return result


def add_linear(module: nn.Module, name: str, weight: Tensor, bias: Tensor | None, requires_grad: bool) -> None:
    """Adds a linear with these very tensors under a dotted name.

    Args:
        module: what gets the linear.
        name: its name within the module; plain modules on the way are made.
        weight: (out, in).
        bias: (out,), or None.
        requires_grad: of both tensors.
    """
    parent_name, _, last = name.rpartition(".")
    for part in filter(None, parent_name.split(".")):
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=requires_grad)
    module.add_module(last, linear)


@contextmanager
def routed(layer: nn.Module, routing: Routing) -> Iterator[None]:
    """Makes every expert module of `layer` use `routing`, and restores the previous routing on exit."""
    modules = [module for module in layer.modules() if isinstance(module, UnfusedExperts)]
    before = [module.routing for module in modules]
    for module in modules:
        module.routing = routing
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.routing = value


def router_linears(layer: nn.Module) -> set[str]:
    """Returns the linears of `layer` that choose experts: those beside the experts with one output per expert."""
    routers, parts = set(), expert_parts(layer)
    for name, module in layer.named_modules():
        fused = [value.shape for value in module.parameters(recurse=False) if value.ndim == 3]
        counts = {shape[0] for shape in fused if shape[0] <= min(shape[1:])}  # otherwise of a convolution, or heads
        if isinstance(module, UnfusedExperts):
            counts.add(module.experts_total)
        block_name, _, _ = name.rpartition(".")
        for part, linear in layer.get_submodule(block_name).named_modules() if counts and name else []:
            full_name = f"{block_name}.{part}" if block_name else part
            is_inside = full_name.startswith(f"{name}.") or full_name in parts
            if isinstance(linear, nn.Linear) and linear.out_features in counts and not is_inside:
                routers.add(full_name)
    return routers


def expert_parts(layer: nn.Module) -> dict[str, ExpertPart]:
    """Returns the position of every linear of an unfused expert, by its name within `layer`."""
    parts: dict[str, ExpertPart] = {}
    for name, module in layer.named_modules():
        if isinstance(module, UnfusedExperts):
            parts |= module.parts(name)
    return parts
