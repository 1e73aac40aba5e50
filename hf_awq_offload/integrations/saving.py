"""Builds the quantization config that a model in memory is saved with: just quantized, or changed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from ..calibration.dataset import CalibrationSet
from ..checkpoint.dense_modules import DenseModules, dense_modules
from ..checkpoint.renaming import Renaming
from ..config import AwqOffloadConfig
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.compressed_tensors_config import META_ATTRIBUTE, PackedCheckpointConfig
from ..formats.grid_choice import GridChoice
from ..formats.source import SourceFormat
from ..logs import get_logger
from ..nn.quantized_linear import QuantizedLinear
from .linear_choice import renaming_of
from .load_call import current_call
from .loading import choice_in

logger = get_logger(__name__)


def checkpoint_config(config: Any) -> AwqCheckpointConfig | PackedCheckpointConfig:
    """Returns a checkpoint's config, built from the one that transformers parsed from config.json.

    Raises:
        CheckpointError: this package can't load this kind of checkpoint.
    """
    if isinstance(config, PackedCheckpointConfig):
        return config
    if config.quant_method == QuantizationMethod.COMPRESSED_TENSORS:
        return PackedCheckpointConfig.from_dict(config.to_dict())
    return AwqCheckpointConfig.from_awq_config(config)


def config_of_result(
    model: PreTrainedModel,
    recipe: AwqOffloadConfig,
    meta: dict[str, Any],
    carried: Sequence[str] = (),
) -> AwqCheckpointConfig | PackedCheckpointConfig:
    """Returns the config of a quantized model.

    Args:
        model: the model.
        recipe: how it was quantized.
        meta: how it was made; stored where the format has room for it.
        carried: modules in full precision that the files hold and the model does not.
    """
    modules = _modules_of(model, renaming_of(model), carried)
    chosen = recipe.modules_to_not_convert or []
    if recipe.checkpoint_format == "awq":
        for linear, dense in list(modules.clashes.items())[:1]:
            logger.warning(
                f"{dense} stays in full precision, and its name is part of that of {linear}, which is quantized. "
                "Servers can't tell them apart and will not load this checkpoint; this package does. Quantize again "
                f'with {linear!r} in modules_to_not_convert, or with format="compressed-tensors".'
            )
        return AwqCheckpointConfig(
            bits=recipe.bits,
            group_size=recipe.group_size,
            zero_point=recipe.base_choice.zero_point,
            modules_to_not_convert=modules.awq_entries(chosen) or None,
            meta=meta,
        )
    grids: dict[str, GridChoice] = {}
    for name, stored in modules.quantized.items():
        grids |= dict.fromkeys((name, stored), recipe.choice(name))  # some readers match one, some the other
    setattr(model.config, META_ATTRIBUTE, meta)
    return PackedCheckpointConfig.of_linears(grids, modules.full_names, chosen)


def _modules_of(model: PreTrainedModel, renaming: Renaming, carried: Sequence[str] = ()) -> DenseModules:
    found = dense_modules(model, renaming, lambda name, module: isinstance(module, QuantizedLinear))
    return replace(found, dense={**found.dense, **{name: name for name in carried}})


def meta_of(model: PreTrainedModel, config: AwqCheckpointConfig | PackedCheckpointConfig) -> dict[str, Any]:
    """Returns what a checkpoint says about how it was made, empty if it says nothing."""
    if isinstance(config, AwqCheckpointConfig):
        return config.meta
    return getattr(model.config, META_ATTRIBUTE, None) or {}


def are_unfused_in_source(model: PreTrainedModel) -> bool:
    """Returns whether the checkpoint that is opened says that its experts were taken apart, all kinds of them."""
    call = current_call()
    fields = {} if call is None else call.quantization or {}
    metas = (fields.get("meta"), getattr(model.config, META_ATTRIBUTE, None))
    return any(isinstance(meta, dict) and bool(meta.get("unfused_experts")) for meta in metas)


def meta_of_run(
    recipe: AwqOffloadConfig,
    calibration: CalibrationSet | None,
    unfused_experts: bool,
    dequantized_from: SourceFormat | None = None,
) -> dict[str, Any]:
    """Returns how a checkpoint is made; the data set by name or hash, never its text.

    Args:
        recipe: how the model is quantized.
        calibration: on which data, if any.
        unfused_experts: experts are loaded one by one, also where the original holds them fused.
        dequantized_from: how the original was quantized, if it was.
    """
    meta: dict[str, Any] = {"quantizer": [f"hf_awq_offload:{version('hf_awq_offload')}"], "seed": recipe.seed}
    if calibration is not None:
        meta |= {
            "dataset": calibration.name,
            "n_samples": len(calibration),
            "max_seq_len": recipe.max_seq_len,
            "calibration_tokens": calibration.tokens,
        }
    if dequantized_from is not None:
        meta["dequantized_from"] = dequantized_from.name
    if unfused_experts:
        meta["unfused_experts"] = True
    search = {name: getattr(recipe, name) for name in ("n_grid", "duo_scaling", "clip", "rounding", "propagate")}
    return meta | search


def leave_out_dense(
    model: PreTrainedModel,
    config: AwqCheckpointConfig | PackedCheckpointConfig,
    renaming: Renaming,
    skipped: list[str],  # name patterns that AWQ loaders leave in full precision
) -> None:
    """Names in `config` the linears that are dense although it calls them quantized: adapters were merged into them."""
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, QuantizedLinear)
        and choice_in(config, name, renaming.name_in_checkpoint(name), module, skipped) is not None
    ]
    if dense:
        modules = _modules_of(model, renaming)
        is_awq = isinstance(config, AwqCheckpointConfig)
        config.leave_out(modules.awq_entries() if is_awq else sorted(modules.full_names))
