"""Reads from transformers' weight conversions which linears of the checkpoint a fused parameter was merged from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .experts import UnfusedExperts


def merged_from(parameter_name: str, conversions: Sequence[Any]) -> list[str] | None:
    """Returns the per-expert linears merged into a parameter; None unless they match <experts>.*.<linear>.weight.

    Args:
        parameter_name: full name of the fused parameter, `model.layers.0.mlp.experts.gate_up_proj`.
        conversions: the model's weight conversions.
    """
    experts_name = parameter_name.rpartition(".")[0]
    converter = _merging(parameter_name, conversions)
    names = []
    for source in converter.source_patterns if converter is not None else []:
        prefix, star, linear = source.replace("\\", "").partition("*.")
        if not star or not f"{experts_name}.".endswith(prefix) or not linear.endswith(".weight"):
            return None
        names.append(linear.removesuffix(".weight"))
    return names if names and all("." not in name for name in names) else None


def is_plainly_merged(parameter_name: str, conversions: Sequence[Any]) -> bool:
    """Returns whether merging only stacks the experts, and puts the rows of their linears one below the other."""
    converter = _merging(parameter_name, conversions)
    return converter is not None and all(
        (isinstance(operation, MergeModulelist) and operation.dim == 0)
        or (isinstance(operation, Concatenate) and operation.dim == 1)
        for operation in converter.operations
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


def _merging(parameter_name: str, conversions: Sequence[Any]) -> Any | None:
    for converter in conversions:
        if _makes(converter, parameter_name) and any(isinstance(op, MergeModulelist) for op in converter.operations):
            return converter
    return None


def _makes(converter: Any, parameter_name: str) -> bool:
    """Returns whether a converter produces the parameter; some converters apply to one part of a model only."""
    scope = getattr(converter, "scope_prefix", None)
    if not isinstance(converter, WeightConverter) or (scope and f".{scope}." not in f".{parameter_name}."):
        return False
    return any(
        re.search(rf"(?:^|\.|(?=\.)){target.lstrip('^').rstrip('$')}$", parameter_name) is not None
        for target in converter.target_patterns
    )
