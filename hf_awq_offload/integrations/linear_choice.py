"""Which linears of a model are quantized, and why the others stay in full precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..checkpoint.dense_modules import dense_modules
from ..checkpoint.renaming import Renaming
from ..config import AwqOffloadConfig
from ..model.decoder_layers import candidate_layers
from ..model.expert_names import conversions_without_merging
from ..model.experts import router_linears
from ..model.linears import is_linear, linears_in
from ..nn.registry import linear_class
from .module_names import is_named

NAMED = "named in modules_to_not_convert"
ROUTER = "chooses experts"
OUTSIDE = "outside the decoder layers"
IN_SEVERAL_LAYERS = "one module of several decoder layers, whose inputs differ"
KEPT_BY_MODEL = "tied, last, or kept in fp32 by the model"
ON_PURPOSE = (NAMED, ROUTER, OUTSIDE, KEPT_BY_MODEL)
"""Reasons of linears that nobody expects to be quantized."""


def linears_in_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns every linear inside the model's decoder layers by its full name."""
    return {
        f"{layer_name}.{name}": linear
        for layer_name, layer in candidate_layers(model).items()
        for name, linear in linears_in(layer).items()
    }


def linears_left_out(model: PreTrainedModel, recipe: AwqOffloadConfig) -> dict[str, str]:
    """Returns every linear of the model that stays in full precision -> why."""
    in_layers = linears_in_layers(model)
    skipped = modules_not_converted(model, recipe.modules_to_not_convert)
    chosen = recipe.modules_to_not_convert or []
    routers = {
        f"{layer_name}.{name}"
        for layer_name, layer in candidate_layers(model).items()
        for name in router_linears(layer)
    }
    renaming = renaming_of(model)
    linear_type = linear_class(recipe.checkpoint_format)
    left_out = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        group_size = recipe.choice(name).group_size
        unpackable = linear_type.unpackable_reason(linear.in_features, linear.out_features, group_size)
        if is_named(name, chosen, renaming):
            left_out[name] = NAMED
        elif name in routers:
            left_out[name] = ROUTER
        elif not is_linear(linear):
            left_out[name] = f"a {type(linear).__name__}, which computes more than a product"
        elif name not in in_layers:
            left_out[name] = OUTSIDE
        elif not renaming.keeps(name, linear_type.NAMES.all):
            left_out[name] = "its name does not survive transformers' renaming of weights"
        elif not should_convert_module(name, skipped):
            left_out[name] = KEPT_BY_MODEL
        elif unpackable is not None:
            left_out[name] = unpackable
    left_out |= dict.fromkeys(_in_several_layers(in_layers), IN_SEVERAL_LAYERS)
    if recipe.checkpoint_format == "awq":
        _leave_out_clashing(model, renaming, in_layers.keys(), left_out)
    return left_out


def _in_several_layers(linears: Mapping[str, nn.Linear]) -> set[str]:
    """Returns the names of linears that are the same module as one of another name."""
    uses = Counter(map(id, linears.values()))
    return {name for name, linear in linears.items() if uses[id(linear)] > 1}


def _leave_out_clashing(
    model: PreTrainedModel, renaming: Renaming, linears: Collection[str], left_out: dict[str, str]
) -> None:
    """Adds the linears that AWQ readers can't tell from those in full precision (formats/names_left_out.py)."""
    while True:
        modules = dense_modules(model, renaming, lambda name, _: name in linears and name not in left_out)
        if not modules.clashes:
            return
        for name, dense in modules.clashes.items():
            last = dense.rpartition(".")[2]
            left_out[name] = (
                f"its name contains that of a module in full precision (….{last}): most AWQ readers can't tell them "
                'apart, format="compressed-tensors" can'
            )


def modules_not_converted(model: PreTrainedModel, chosen: list[str] | None) -> list[str]:
    """Returns the name patterns that transformers' own AWQ loader leaves in full precision, `chosen` among them."""
    return HfQuantizer.get_modules_to_not_convert(
        model,
        chosen,
        getattr(model, "_keep_in_fp32_modules", None),
        add_default_skips=True,
    )


def renaming_of(model: PreTrainedModel) -> Renaming:
    """Returns how transformers renames the model's weights between memory and checkpoint, experts one by one."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return Renaming(conversions_without_merging(conversions, model))
