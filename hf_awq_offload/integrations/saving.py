"""Builds the quantization config that a model in memory is saved with: just quantized, or changed since."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from ..calibration.dataset import CalibrationSet
from ..checkpoint.renaming import Renaming
from ..config import AwqOffloadConfig
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.compressed_tensors_config import META_ATTRIBUTE, PackedCheckpointConfig, may_be_taken_for_a_linear
from ..formats.grid_choice import GridChoice
from ..formats.source import SourceFormat
from ..nn.quantized_linear import QuantizedLinear
from .loading import choice_in


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
    renaming: Renaming,
    left_out: list[str],  # linears in full precision
    meta: dict[str, Any],
    beside: Sequence[str] = (),  # modules in full precision that the checkpoint holds and the model does not
) -> AwqCheckpointConfig | PackedCheckpointConfig:
    """Returns the config of a model quantized with `recipe`; `meta` is stored where the format has room for it."""
    left_out = sorted({*left_out, *beside})
    if recipe.checkpoint_format == "awq":
        return AwqCheckpointConfig(
            bits=recipe.bits,
            group_size=recipe.group_size,
            zero_point=recipe.zero_point,
            modules_to_not_convert=left_out or None,
            meta=meta,
        )
    grids: dict[str, GridChoice] = {}
    ignored: set[str] = set(beside)
    for name, module in model.named_modules():
        names = {name, renaming.name_in_checkpoint(name)}  # some readers match one, some the other
        if isinstance(module, QuantizedLinear):
            grids |= dict.fromkeys(names, recipe.choice(name))
        elif may_be_taken_for_a_linear(module):
            ignored |= names
    setattr(model.config, META_ATTRIBUTE, meta)
    return PackedCheckpointConfig.of_linears(grids, ignored)


def meta_of(model: PreTrainedModel, config: AwqCheckpointConfig | PackedCheckpointConfig) -> dict[str, Any]:
    """Returns what a checkpoint says about how it was made, empty if it says nothing."""
    if isinstance(config, AwqCheckpointConfig):
        return config.meta
    return getattr(model.config, META_ATTRIBUTE, None) or {}


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


def dense_in_spite(
    model: PreTrainedModel,
    config: AwqCheckpointConfig | PackedCheckpointConfig,
    renaming: Renaming,
    skipped: list[str],  # name patterns that AWQ loaders leave in full precision
) -> list[str]:
    """Returns the linears that are dense although `config` calls them quantized: adapters were merged into them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, QuantizedLinear)
        and choice_in(config, name, renaming.name_in_checkpoint(name), module, skipped) is not None
    ]
