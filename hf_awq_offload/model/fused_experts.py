"""Finds fused experts in a model, and replaces them by one linear for each expert and projection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from ..errors import ModelStructureError
from .decoder_layers import candidate_layers
from .expert_interface import fused_names, is_fused_experts, original_projections, unfused
from .expert_layouts import Refusal, fused_matrices, layout_of
from .expert_names import is_plainly_merged, merged_from
from .experts import UnfusedExperts, WithoutFused
from .replayed_experts import ProductLayout, ReplayedExperts, replayed


@dataclass(frozen=True)
class FusedExperts:
    """A module whose experts can be taken apart."""

    module: nn.Module
    layout: ProductLayout | None
    """None: the module has transformers' experts interface."""

    @property
    def matrices(self) -> list[str]:
        """Names of the fused matrices within the module."""
        return fused_names(self.module) if self.layout is None else list(self.layout.parameters)

    @property
    def input_widths(self) -> list[int]:
        """Features of each distinct input that linears of the experts will read."""
        if self.layout is None:
            experts, *features = self.module.get_parameter("down_proj").shape
            return features * experts
        distinct = {parameter.in_features: parameter for parameter in self.layout.parameters.values()}
        return [width for width, parameter in distinct.items() for _ in range(parameter.experts)]

    def matrix_size(self, matrix: str) -> int:
        """Returns the number of elements of each linear's weight that a fused matrix will be divided into."""
        if self.layout is not None:
            parameter = self.layout.parameters[matrix]
            return parameter.rows * parameter.columns // len(parameter.projections)
        size = self.module.get_parameter(matrix)[0].numel()
        return size // 2 if matrix == "gate_up_proj" else size

    def unfused(self, name: str, conversions: Sequence[Any]) -> UnfusedExperts:
        """Returns the experts one by one; `name` is that of the module, for the names in the checkpoint."""
        if self.layout is None:
            return unfused(self.module, original_projections(name, self.module, conversions))
        return replayed(self.module, self._named_as_stored(name, conversions) or self.layout)

    def is_stored_apart(self, name: str, conversions: Sequence[Any]) -> bool:
        """Returns whether the checkpoint holds these experts one by one."""
        if self.layout is None:
            return original_projections(name, self.module, conversions) is not None
        return self._named_as_stored(name, conversions) is not None

    def _named_as_stored(self, name: str, conversions: Sequence[Any]) -> ProductLayout | None:
        """Returns the layout with the names of the checkpoint's linears; None if it holds fused tensors."""
        assert self.layout is not None
        named = {}
        for key, parameter in self.layout.parameters.items():
            linears = merged_from(f"{name}.{key}", conversions)
            is_plain = is_plainly_merged(f"{name}.{key}", conversions) and not parameter.is_transposed
            if linears is None or not is_plain or "." in key or parameter.out_features % len(linears):
                return None
            named[key] = replace(parameter, projections=tuple(linears))
        return replace(self.layout, parameters=named)


def fused_experts(layer: nn.Module) -> dict[str, FusedExperts]:
    """Returns the modules of a decoder layer whose experts can be taken apart, by name."""
    found, _ = _searched(layer)
    return found


def refusals(layer: nn.Module) -> dict[str, str]:
    """Returns what of a decoder layer holds stacks of matrices but can't be taken apart -> why: modules, parameters."""
    _, refused = _searched(layer)
    return refused


def has_fused_experts(model: nn.Module) -> bool:
    return any(map(is_fused_experts, model.modules())) or any(map(fused_experts, candidate_layers(model).values()))


def fused_experts_of(model: nn.Module) -> dict[str, FusedExperts]:
    """Returns a model's modules whose experts can be taken apart, by name, in the model's order.

    Those with transformers' interface are found anywhere, others in decoder layers.
    """
    found = {name: FusedExperts(module, None) for name, module in model.named_modules() if is_fused_experts(module)}
    for layer_name, layer in candidate_layers(model).items():
        found |= {f"{layer_name}.{name}": experts for name, experts in fused_experts(layer).items()}
    return found


def linears_to_come(model: nn.Module) -> list[str]:
    """Returns the names of the linears that taking fused experts apart will make; `model` is on the meta device."""
    conversions = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    return [
        f"{name}.{inner}"
        for name, experts in fused_experts_of(model).items()
        for inner, module in experts.unfused(name, conversions).named_modules()
        if isinstance(module, nn.Linear)
    ]


def stored_fused(model: nn.Module, taken_apart: Mapping[str, nn.Module]) -> list[str]:
    """Returns those of the experts that were taken apart which the model's checkpoints hold fused.

    Args:
        model: holds them one by one by now.
        taken_apart: name -> the module as it was.
    """
    conversions = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    layouts = {name: getattr(model.get_submodule(name), "layout", None) for name in taken_apart}
    return [
        name
        for name, module in taken_apart.items()
        if not FusedExperts(module, layouts[name]).is_stored_apart(name, conversions)
    ]


def take_experts_apart(model: nn.Module, all_kinds: bool, stored: Collection[str] = ()) -> dict[str, nn.Module]:
    """Replaces fused experts by one linear for each expert and projection, in place; after an error, none is replaced.

    Args:
        model: a transformers model, its weights loaded or not.
        all_kinds: take experts apart that the checkpoint holds fused, too, not only those that it holds one by one.
        stored: parameters of the model that the checkpoint at hand holds. Checkpoints of a type hold experts one by
            one, as a rule, but `save_pretrained(save_original_format=False)` and some tools write them fused.

    Returns:
        The modules that were replaced, by name.

    Raises:
        ModelStructureError: experts share their weights with another layer.
    """
    conversions = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    fused = fused_experts_of(model)
    for name, experts in fused.items():
        if any(f"{name}.{parameter}" in (*tied, *tied.values()) for parameter in experts.matrices):
            raise ModelStructureError(
                f"{name} of {type(model).__name__} shares its experts with other layers; supported are experts "
                "of a single layer."
            )
    replaced: dict[str, nn.Module] = {}
    try:
        for name, experts in fused.items():
            is_fused = any(f"{name}.{parameter}" in stored for parameter in experts.matrices)
            if all_kinds or (experts.is_stored_apart(name, conversions) and not is_fused):
                model.set_submodule(name, experts.unfused(name, conversions))
                replaced[name] = experts.module
    except BaseException:
        for name, module in replaced.items():
            model.set_submodule(name, module)
        raise
    return replaced


def _searched(layer: nn.Module) -> tuple[dict[str, FusedExperts], dict[str, str]]:
    found: dict[str, FusedExperts] = {}
    refused: dict[str, str] = {}
    holders = {
        name: module
        for name, module in layer.named_modules()
        if name and not isinstance(module, WithoutFused) and (is_fused_experts(module) or fused_matrices(module))
    }
    for name, module in layer.named_modules():
        if isinstance(module, ReplayedExperts):
            refused |= {f"{name}.{key}": reason for key, reason in module.layout.refused.items()}
    for name, module in holders.items():
        if is_fused_experts(module):
            found[name] = FusedExperts(module, None)
            continue
        chosen, layout = name, layout_of(module)
        block = name.rpartition(".")[0]
        is_alone = block and [other for other in holders if f"{other}.".startswith(f"{block}.")] == [name]
        if isinstance(layout, Refusal) and is_alone:  # the module above may cut out the slices
            of_block = layout_of(layer.get_submodule(block))
            chosen, layout = (block, of_block) if isinstance(of_block, ProductLayout) else (name, layout)
        if isinstance(layout, ProductLayout):
            found[chosen] = FusedExperts(layer.get_submodule(chosen), layout)
        elif any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            refused[name] = layout.reason
    return found, refused
