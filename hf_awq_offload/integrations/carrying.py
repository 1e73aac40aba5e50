"""Decides what becomes of the source's tensors that the model class has no place for.

transformers leaves out the layers that predict further tokens (multi-token prediction: DeepSeek-V3, GLM-4.5, Qwen3-Next
and others). Servers use them for speculative decoding, so the result has them under their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import CarriedTensor, StoredTensor
from ..config import AwqOffloadConfig
from ..formats.name_patterns import ancestors
from ..logs import get_logger
from ..messages import shortened
from ..model.decoder_layers import candidate_layers
from .source_fit import SourceFit

logger = get_logger(__name__)

RECOMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask|(attn|attention)\.bias)$")
"""Matches buffers that old checkpoints hold and models compute anew."""
MTP = re.compile(r"(^|[._])(mtp|nextn)([._]|$)", re.IGNORECASE)
"""Matches the names of layers for multi-token prediction, and of the config's fields that count them."""
INDEX = re.compile(r"\.(?P<index>\d+)(?=\.)")
"""Matches the index of a layer in the name of a tensor."""
MOST_NAMED = 4


def carried(
    model: PreTrainedModel, recipe: AwqOffloadConfig, source: Source, found: SourceFit
) -> dict[str, StoredTensor]:
    """Returns the tensors of the source to keep beside the model, and says which; drops what `recipe.mtp` drops.

    Where they are dropped, the fields of the model's config that count such layers become 0.
    """
    kept = carried_names(found.unplaced)
    mtp = set(mtp_tensors(model, found))
    if recipe.mtp == "drop" and mtp:
        kept = [name for name in kept if name not in mtp]
        logger.warning(
            f"Dropped, as mtp='drop' says: {shortened(sorted(mtp), MOST_NAMED)}, for multi-token prediction."
        )
        _promise_no_mtp(model)
    if kept:
        logger.warning(
            f"{type(model).__name__} has no place for {len(kept)} tensors of the checkpoint "
            f"({shortened(kept, MOST_NAMED)}). The result keeps them as they are, in full precision."
        )
    return {name: source.tensors[name] for name in kept}


def carried_names(unplaced: Sequence[str]) -> list[str]:
    """Returns those of the tensors without a place that a model does not compute anew."""
    return [name for name in unplaced if not RECOMPUTED.search(name)]


def mtp_tensors(model: PreTrainedModel, found: SourceFit) -> list[str]:
    """Returns the tensors of layers for multi-token prediction.

    They are called so ("mtp.layers.0.…"), or are decoder layers beyond the model's last one ("model.layers.61.…").
    """
    last = _last_layers(model, found) if found.unplaced else {}
    return [
        name
        for name in carried_names(found.unplaced)
        if MTP.search(name)
        or any(int(match["index"]) > last.get(name[: match.start()], math.inf) for match in INDEX.finditer(name))
    ]


def _last_layers(model: PreTrainedModel, found: SourceFit) -> dict[str, int]:
    """Returns, by its name in the checkpoint, the index of the last layer of each stack of decoder layers."""
    last: dict[str, int] = {}
    layers = candidate_layers(model)
    for name, stored in found.placed.items():
        for layer in filter(layers.__contains__, ancestors(name)):
            index = layer.rpartition(".")[2]
            stack, dot, _ = stored.partition(f".{index}.")
            if index.isdecimal() and dot:
                last[stack] = max(last.get(stack, 0), int(index))
    return last


def _promise_no_mtp(model: PreTrainedModel) -> None:
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for name, value in config.to_dict().items():
            if MTP.search(name) and isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, 0)


def modules_of(tensors: Mapping[str, CarriedTensor]) -> list[str]:
    """Returns the names of modules among carried tensors that readers may take for linears: those with a matrix."""
    return sorted(
        name.removesuffix(".weight")
        for name, stored in tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    )
