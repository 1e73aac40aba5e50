"""Splits transformers' fused mixture-of-experts weights into one linear per expert and projection.

Letters: E experts, H hidden size, I intermediate size, T tokens, k experts per token.

transformers 5 holds the experts of a layer in 3-D parameters: `gate_up_proj` (E, 2I, H), or `up_proj` (E, I, H) without
a gate, and `down_proj` (E, H, I). Flags on the module say how to read them: `has_gate`, `has_bias`, `is_transposed`
((E, H, 2I) and (E, I, H)), `is_concatenated` (gate rows first; otherwise gate and up rows alternate). Every module with
these flags is unfused, under the names that the per-expert weights have in the original checkpoint.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from ..errors import ModelStructureError

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


class Projections(NamedTuple):
    """The names of an expert's linears; `gate` is empty if there is no gate."""

    gate: str
    up: str
    down: str


class Routing(Enum):
    """The rule that decides which tokens go through which experts."""

    TOP_K = "as the router says"
    EVERY_TOKEN = "every expert computes every token, the output is as the router says"
    UNIFORM = "every expert computes every token, and all count the same in the output"


def is_fused_experts(module: nn.Module) -> bool:
    """Returns whether `module` has the experts interface and its fused parameters."""
    has_flags = all(hasattr(module, flag) for flag in FLAGS)
    return has_flags and all(
        isinstance(parameter := getattr(module, name, None), nn.Parameter) and parameter.ndim == 3
        for name in fused_names(module)
    )


def fused_names(module: nn.Module) -> list[str]:
    """Returns the names of the fused weights, first and second projection."""
    return ["gate_up_proj" if cast(Any, module).has_gate else "up_proj", "down_proj"]


def original_projections(module_name: str, module: nn.Module, conversions: Sequence[Any]) -> Projections | None:
    """Reads the names of the checkpoint's per-expert linears from the converters that merge them; None if none does."""
    first, second = (_merged_from(f"{module_name}.{fused}", conversions) for fused in fused_names(module))
    has_gate = cast(Any, module).has_gate
    if first is None or second is None or len(first) != 1 + has_gate or len(second) != 1:
        return None
    return Projections(*(first if has_gate else ["", *first]), *second)


def _merged_from(parameter_name: str, conversions: Sequence[Any]) -> list[str] | None:
    """Returns the per-expert linears merged into a parameter; None unless they match <experts>.*.<linear>.weight."""
    experts_name = parameter_name.rpartition(".")[0]
    for converter in conversions:
        if not _merges_into(converter, parameter_name):
            continue
        names = []
        for source in converter.source_patterns:
            prefix, star, linear = source.replace("\\", "").partition("*.")
            if not star or not f"{experts_name}.".endswith(prefix) or not linear.endswith(".weight"):
                return None
            names.append(linear.removesuffix(".weight"))
        return names if all("." not in name for name in names) else None
    return None


def _merges_into(converter: Any, parameter_name: str) -> bool:
    return _makes(converter, parameter_name) and any(
        isinstance(operation, MergeModulelist) for operation in converter.operations
    )


def _makes(converter: Any, parameter_name: str) -> bool:
    """Returns whether a converter produces the parameter; some converters apply to one part of a model only."""
    scope = getattr(converter, "scope_prefix", None)
    if not isinstance(converter, WeightConverter) or (scope and f".{scope}." not in f".{parameter_name}."):
        return False
    return any(
        re.search(rf"(?:^|\.|(?=\.)){target.lstrip('^').rstrip('$')}$", parameter_name) is not None
        for target in converter.target_patterns
    )


def conversions_without_merging(conversions: Sequence[Any], model: nn.Module) -> list[Any]:
    """Returns `conversions` without those that would fuse the weights of experts that `model` holds one by one."""
    fused = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, UnfusedExperts)
        for parameter in module.was_fused
    ]
    return [converter for converter in conversions if not any(_makes(converter, name) for name in fused)]


def unfused(module: nn.Module, names: Projections | None = None) -> UnfusedExperts:
    """Returns a module that computes what `module` does, with one linear per expert and projection.

    The result is on the meta device if `module` is. Otherwise the linears' weights are views of the fused ones unless
    these are transposed or interleaved, so that taking experts apart needs no memory.
    """
    names = names or Projections("gate_proj" if cast(Any, module).has_gate else "", "up_proj", "down_proj")
    result = copy.copy(module)
    result.__class__ = UnfusedExperts
    assert isinstance(result, UnfusedExperts)
    result.fused_class = type(module)
    first, second = fused_names(module)
    fused = [name for name in module._parameters if name.removesuffix("_bias") in (first, second)]
    result._parameters = {name: value for name, value in module._parameters.items() if name not in fused}
    result._modules = dict(module._modules)
    result.projections, result.was_fused, result.routing = names, tuple(fused), Routing.TOP_K
    result.experts_total = cast(Tensor, getattr(module, second)).shape[0]
    for expert in range(result.experts_total):
        result.add_module(str(expert), _one_expert(module, expert, names))
    return result


def take_experts_apart(model: nn.Module, all_kinds: bool) -> dict[str, nn.Module]:
    """Replaces fused experts by one linear for each expert and projection, in place; after an error, none is replaced.

    Args:
        model: a transformers model, its weights loaded or not.
        all_kinds: take experts apart that the checkpoint holds fused, too, not only those that it holds one by one.

    Returns:
        The modules that were replaced, by name.

    Raises:
        ModelStructureError: experts share their weights with another layer.
    """
    conversions = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    fused = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    for name, module in fused.items():
        if any(f"{name}.{parameter}" in (*tied, *tied.values()) for parameter in fused_names(module)):
            raise ModelStructureError(
                f"{name} of {type(model).__name__} shares its experts with other layers; supported are experts "
                "of a single layer."
            )
    replaced: dict[str, nn.Module] = {}
    try:
        for name, module in fused.items():
            projections = original_projections(name, module, conversions)
            if projections is not None or all_kinds:
                model.set_submodule(name, unfused(module, projections))
                replaced[name] = module
    except BaseException:
        for name, module in replaced.items():
            model.set_submodule(name, module)
        raise
    return replaced


def _one_expert(module: nn.Module, expert: int, names: Projections) -> nn.Module:
    flags = cast(Any, module)
    first, second = fused_names(module)

    def part(name: str, rows: slice) -> nn.Linear:
        weight = getattr(module, name).detach()[expert]  # (out, in), or (in, out)
        weight = (weight.t() if flags.is_transposed else weight)[rows]
        bias = getattr(module, f"{name}_bias").detach()[expert][rows] if flags.has_bias else None
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=getattr(module, name).requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.contiguous(), requires_grad=linear.weight.requires_grad)
        return linear

    result = nn.Module()
    everything = slice(None)
    if flags.has_gate:
        rows = getattr(module, first).shape[2 if flags.is_transposed else 1]
        halves = slice(0, rows // 2), slice(rows // 2, None)
        gate, up = halves if flags.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        result.add_module(names.gate, part(first, gate))
        result.add_module(names.up, part(first, up))
    else:
        result.add_module(names.up, part(first, everything))
    result.add_module(names.down, part(second, everything))
    return result


class UnfusedExperts(nn.Module):
    """Experts taken apart by `unfused`; expert e is the submodule named "e".

    The module has the attributes of the fused experts and uses their gate, activation and norm. It is not an instance
    of their class, because that class's initialization needs the fused parameters.
    """

    fused_class: type[nn.Module]
    projections: Projections
    was_fused: tuple[str, ...]
    routing: Routing
    experts_total: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the experts: (T, H) hidden states, (T, k) int64 experts of each token, (T, k) weights -> (T, H)."""
        signature = inspect.signature(self.fused_class.forward)
        _, hidden_states, top_k_index, top_k_weights = signature.bind(self, *args, **kwargs).args
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k_index = top_k_index.reshape(x.shape[0], -1)
        top_k_weights = top_k_weights.reshape(x.shape[0], -1)
        output = torch.zeros_like(x)
        for expert in range(self.experts_total):
            if self.routing is Routing.TOP_K:
                token, place = torch.where(top_k_index == expert)
                if not len(token):
                    continue
                weighted = self._compute(expert, x[token]) * top_k_weights[token, place, None]
                output.index_add_(0, token, weighted.to(output.dtype))
                continue
            weight = (top_k_weights * (top_k_index == expert)).sum(dim=1, keepdim=True)
            if self.routing is Routing.UNIFORM:
                weight = torch.full_like(weight, 1 / self.experts_total)
            output += (self._compute(expert, x) * weight).to(output.dtype)
        return output.view_as(hidden_states)

    def __getattr__(self, name: str) -> Any:
        """Binds methods of the fused experts to this module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__.get("was_fused", ()):  # enclosing blocks initialize experts under these names
                return _initialized_already()
            method = getattr(self.__dict__.get("fused_class"), name, None)
            if not inspect.isfunction(method):
                raise
            return functools.partial(method, self)

    def _compute(self, expert: int, x: Tensor) -> Tensor:
        """Runs one expert: (t, H) -> (t, H)."""
        flags, linears = cast(Any, self), cast(Any, self.get_submodule(str(expert)))
        up = linears.get_submodule(self.projections.up)(x)
        if flags.has_gate:
            gate = linears.get_submodule(self.projections.gate)(x)
            both = torch.cat([gate, up], -1) if flags.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
            inner = flags._apply_gate(both)
        else:
            inner = flags.act_fn(up)
        output = linears.get_submodule(self.projections.down)(inner)
        return flags.post_expert_norm(output) if getattr(flags, "has_post_expert_norm", False) else output


def _initialized_already() -> Tensor:
    """Returns a tensor that transformers' initialization skips."""
    tensor = torch.empty(0)
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


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
    routers = set()
    for name, module in layer.named_modules():
        fused = [value.shape for value in module.parameters(recurse=False) if value.ndim == 3]
        counts = {shape[0] for shape in fused if shape[0] <= min(shape[1:])}  # otherwise of a convolution, or heads
        if isinstance(module, UnfusedExperts):
            counts.add(module.experts_total)
        block_name, _, _ = name.rpartition(".")
        for part, linear in layer.get_submodule(block_name).named_modules() if counts and name else []:
            full_name = f"{block_name}.{part}" if block_name else part
            is_inside = full_name.startswith(f"{name}.")
            if isinstance(linear, nn.Linear) and linear.out_features in counts and not is_inside:
                routers.add(full_name)
    return routers


class ExpertPart(NamedTuple):
    """The position of a linear among a layer's experts."""

    experts: str  # name of the experts module within the layer
    expert: int
    projection: str

    @property
    def family(self) -> str:
        """A name that this projection shares over all experts."""
        return f"{self.experts}.*.{self.projection}"

    @property
    def expert_name(self) -> str:
        return f"{self.experts}.{self.expert}"


def expert_parts(layer: nn.Module) -> dict[str, ExpertPart]:
    """Returns the position of every linear of an unfused expert, by its name within `layer`."""
    return {
        f"{name}.{expert}.{projection}": ExpertPart(name, expert, projection)
        for name, module in layer.named_modules()
        if isinstance(module, UnfusedExperts)
        for expert in range(module.experts_total)
        for projection in module.projections
        if projection
    }
