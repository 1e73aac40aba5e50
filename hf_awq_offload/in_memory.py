"""Quantizes a model that is already in memory: fully, or, if anything fails, not at all."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any, cast

from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .config import AwqOffloadConfig, require_recipe
from .errors import ModelStructureError
from .integrations.dispatching import dispatch
from .integrations.one_at_a_time import one_at_a_time
from .integrations.quantizer import AwqOffloadQuantizer
from .pipeline.layer_context import Undo


@one_at_a_time()
def quantize_model(
    model: PreTrainedModel,
    config: AwqOffloadConfig,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | str | None = None,
) -> PreTrainedModel:
    """Calibrates and quantizes a model that is already in memory, in place; returns it.

    The model ends up on the devices it came on. If anything fails, it is restored to what it was.

    Args:
        model: a decoder-only or image-text model in full precision.
        config: the recipe.
        tokenizer: tokenizer or processor for calibration texts and conversations; by default `config.tokenizer`, else
            the one of the model's checkpoint.

    Raises:
        AwqOffloadError: the model can't be quantized, or the data can't be used; the model is unchanged.
    """
    require_recipe(config)
    if not isinstance(model, PreTrainedModel):
        raise ModelStructureError(f"model is a {type(model).__name__}; pass a transformers PreTrainedModel.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelStructureError("The model is quantized already; pass it in full precision.")
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_" in name for name, _ in model.named_parameters()):
        raise ModelStructureError("The model carries adapters; merge them first (merge_and_unload) or remove them.")
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ModelStructureError("Weights of the model are on the meta device; load them first.")
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        raise ModelStructureError(
            "The model has layers on disk, so it can't be quantized in place; call from_pretrained with the recipe as "
            "quantization_config instead, or hf_awq_offload.quantize."
        )
    recipe = copy.copy(config)
    if tokenizer is not None:
        recipe.tokenizer = tokenizer
    quantizer = AwqOffloadQuantizer(recipe, pre_quantized=False)
    device_map = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}
    conversions = getattr(model, "_weight_conversions", None)
    undo: Undo = []
    try:
        quantizer.preprocess_model(model)
        remove_hook_from_submodules(model)
        nn.Module.to(model, "cpu")
        with closing(quantizer.prepare(model)) as storage:
            quantizer.quantize(model, storage, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        for name, module in quantizer.fused.items():
            model.set_submodule(name, module)
        cast(Any, model)._weight_conversions = conversions
        quantizer.remove_quantization_config(model)
        raise
    finally:
        dispatch(model, device_map)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    cast(Any, model).hf_quantizer = quantizer
    return model
