"""What config.json says of a model in memory: just quantized, or changed since."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from .checkpoint_config import AwqCheckpointConfig
from .config import AwqOffloadConfig
from .loading import choice_in
from .names import Renaming
from .overrides import GridChoice
from .packed_checkpoint_config import PackedCheckpointConfig
from .quantized_linear import QuantizedLinear

META_ATTRIBUTE = "quantization_meta"
"""Of a model's config: how a compressed-tensors checkpoint was made, for which that standard leaves no room."""


def checkpoint_config(config: Any) -> AwqCheckpointConfig | PackedCheckpointConfig:
    """Of a checkpoint, from what transformers parsed its config.json to.

    Raises:
        CheckpointError: the checkpoint is of a kind that this package can't load.
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
) -> AwqCheckpointConfig | PackedCheckpointConfig:
    """The config of the model that was quantized by `recipe`; `meta` is stored where the format has room for it."""
    if recipe.checkpoint_format == "awq":
        return AwqCheckpointConfig.from_recipe(recipe, left_out, meta)
    grids: dict[str, GridChoice] = {}
    ignored: set[str] = set()
    for name, module in model.named_modules():
        names = {name, renaming.name_in_checkpoint(name)}  # some readers match one, some the other
        if isinstance(module, QuantizedLinear):
            grids |= dict.fromkeys(names, recipe.choice(name))
        elif _has_matrix(module):
            ignored |= names
    setattr(model.config, META_ATTRIBUTE, meta)
    return PackedCheckpointConfig.of_linears(grids, ignored)


def meta_of(model: PreTrainedModel, config: AwqCheckpointConfig | PackedCheckpointConfig) -> dict[str, Any]:
    """How a checkpoint was made, as far as it says."""
    if isinstance(config, AwqCheckpointConfig):
        return config.meta
    return getattr(model.config, META_ATTRIBUTE, None) or {}


def dense_in_spite(
    model: PreTrainedModel,
    config: AwqCheckpointConfig | PackedCheckpointConfig,
    renaming: Renaming,
    skipped: list[str],  # name patterns that AWQ loaders leave in full precision
) -> list[str]:
    """Linears that are dense although `config` says that they are quantized: adapters were merged into them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, QuantizedLinear)
        and choice_in(config, name, renaming.name_in_checkpoint(name), module, skipped) is not None
    ]


def _has_matrix(module: nn.Module) -> bool:
    """Whether readers of compressed-tensors may take it for a linear: linears, and routers that are none of ours."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
