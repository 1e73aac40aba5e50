"""Fused experts of any class, taken apart: their own forward runs, with a linear for each expert's slice.

Letters: E experts, (a, b) rows and columns of one expert's slice of a fused parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .expert_contracts import Contract, GroupedTokens, SortedRows
from .expert_products import ExpertSlice, FusedWeight
from .experts import ExpertPart, Routing, UnfusedExperts, WithoutFused, add_linear, without_fused


@dataclass(frozen=True)
class FusedParameter:
    """How a fused parameter is divided among experts."""

    shape: tuple[int, ...]
    """(E, a, b), or (E · a, b)."""
    rows: int
    columns: int
    is_transposed: bool
    """A slice is stored (in, out)."""
    projections: tuple[str, ...]
    """Names of the linears that share a slice's output features, in order; an empty name: the expert is the linear."""

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else self.shape[0] // self.rows

    @property
    def in_features(self) -> int:
        return self.rows if self.is_transposed else self.columns

    @property
    def out_features(self) -> int:
        return self.columns if self.is_transposed else self.rows

    def slice_of(
        self,
        tensor: Tensor,  # the parameter
        expert: int,
    ) -> Tensor:
        """Returns an expert's weight, (out, in)."""
        stored = tensor[expert] if tensor.ndim == 3 else tensor[expert * self.rows : (expert + 1) * self.rows]
        return stored.t() if self.is_transposed else stored


@dataclass(frozen=True)
class ProductLayout:
    """What the proof found about a module: its fused parameters, and what its forward takes."""

    contract: Contract
    parameters: Mapping[str, FusedParameter]
    """By name within the module."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Matrices of the module that stay as they are -> why."""

    @property
    def experts_total(self) -> int:
        return max(parameter.experts for parameter in self.parameters.values())

    @property
    def experts_computing(self) -> int:
        """Fewer than all if a parameter has slices for experts that compute nothing."""
        return min(parameter.experts for parameter in self.parameters.values())


def replayed(module: nn.Module, layout: ProductLayout, as_views: bool = False) -> ReplayedExperts:
    """Returns a module that computes what `module` does, with a linear per expert and projection.

    The result is on the meta device if `module` is. Otherwise the linears' weights are views of the fused ones unless
    these are transposed, so that taking experts apart needs no memory. With `as_views` they are views in any case.
    """
    result = without_fused(module, layout.parameters.keys(), ReplayedExperts)
    result.layout, result.was_fused, result.routing = layout, tuple(layout.parameters), Routing.TOP_K
    result.experts_total = layout.experts_total
    for owner in sorted({name.rpartition(".")[0] for name in layout.parameters} - {""}):
        names_of = {name.rpartition(".")[2]: name for name in layout.parameters if name.rpartition(".")[0] == owner}
        shell = without_fused(module.get_submodule(owner), names_of.keys(), _Shell)
        shell.was_fused, shell.names_of, shell.experts = tuple(names_of), names_of, _Unregistered(result)
        result.set_submodule(owner, shell)
    fused = {name: module.get_parameter(name) for name in layout.parameters}
    requires_grad = all(parameter.requires_grad for parameter in fused.values())
    tensors = result.views_of(fused) if as_views else result.taken_apart(fused)
    for name in tensors:
        add_linear(result, name.removesuffix(".weight"), tensors[name], None, requires_grad)
    return result


class ReplayedExperts(UnfusedExperts):
    """Experts that run the forward of the fused module, in which `FusedWeight` stands for its parameters."""

    layout: ProductLayout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the fused module does. Compilers leave it alone: offsets of views choose modules."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._run)(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(self.fused_class.forward)
        _, *arguments = signature.bind(self, *args, **kwargs).args
        layout = self.layout
        output = layout.contract.run(
            self._as_fused, arguments, self.routing, layout.experts_computing, self._run_expert
        )
        if self.routing is not Routing.TOP_K:
            for expert in range(layout.experts_computing, layout.experts_total):  # to be quantized like the others
                self._run_expert(expert, arguments[0])
        return output

    def linears_of(self, expert: int) -> list[tuple[str, str]]:
        return [
            (".".join(filter(None, (str(expert), projection))), projection)
            for parameter in self.layout.parameters.values()
            for projection in parameter.projections
            if expert < parameter.experts
        ]

    def parts(self, module_name: str) -> dict[str, ExpertPart]:
        """Counts a module for one projection among the experts of the module above, which has the other projections."""
        parts = super().parts(module_name)
        if not isinstance(self.layout.contract, SortedRows):
            return parts
        block, _, projection = module_name.rpartition(".")
        return {
            name: ExpertPart(block, part.expert, ".".join(filter(None, (projection, part.projection))))
            for name, part in parts.items()
        }

    def taken_apart(self, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: view.contiguous() for name, view in self.views_of(fused).items()}

    def views_of(self, fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the linears' weights as views of the fused parameters, by name within the module."""
        tensors = {}
        for name, parameter in self.layout.parameters.items():
            for expert in range(parameter.experts):
                weight = parameter.slice_of(fused[name].detach(), expert)
                parts = weight.chunk(len(parameter.projections))
                for projection, part in zip(parameter.projections, parts, strict=True):
                    linear = ".".join(filter(None, (str(expert), projection)))
                    tensors[f"{linear}.weight"] = part
        return tensors

    def multiply(
        self,
        x: Tensor,  # (..., in)
        expert_slice: ExpertSlice,
    ) -> Tensor:
        """Runs the linears of an expert's slice: (..., out). Rows of zeros are left out where grouping makes them."""
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.layout.parameters[expert_slice.parameter].out_features)
        if isinstance(self.layout.contract, GroupedTokens) and x.ndim == 2:
            is_filled = x.any(dim=-1)
            if not bool(is_filled.all()):
                output = self._product(x[is_filled], expert_slice)
                return output.new_zeros(x.shape[0], output.shape[-1]).index_put((is_filled,), output)
        return self._product(x, expert_slice)

    def compute_device(self) -> torch.device:
        return next(self.parameters()).device

    def _product(self, x: Tensor, expert_slice: ExpertSlice) -> Tensor:
        parameter = self.layout.parameters[expert_slice.parameter]
        expert = self.get_submodule(str(expert_slice.expert))
        outputs = [expert.get_submodule(projection)(x) for projection in parameter.projections]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _run_expert(self, expert: int, x: Tensor) -> None:
        """Shows rows to the linears of an expert that can read them."""
        for name, _ in self.linears_of(expert):
            linear = cast(nn.Linear, self.get_submodule(name))
            if linear.in_features == x.shape[-1]:
                linear(x.reshape(-1, x.shape[-1]))

    def _as_fused(self, *args: Any) -> Any:
        return cast(Any, self.fused_class).forward(self, *args)

    def _in_place_of(self, name: str) -> Tensor:
        shape = self.layout.parameters[name].shape
        linear: Any = self.get_submodule(self.linears_of(0)[0][0])
        dtype = getattr(linear, "dtype", None) or linear.weight.dtype
        return FusedWeight.of(self, name, shape, dtype)


class _Shell(WithoutFused):
    """A part of the experts module, without the fused parameters that it held."""

    experts: _Unregistered
    names_of: dict[str, str]
    """Fused parameter's name in this part -> its name in the experts module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self.fused_class).forward(self, *args, **kwargs)

    def _in_place_of(self, name: str) -> Tensor:
        return self.experts.module._in_place_of(self.names_of[name])


@dataclass
class _Unregistered:
    """Holds a module without making it a submodule: the experts module contains its parts already."""

    module: ReplayedExperts
