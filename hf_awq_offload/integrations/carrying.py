"""Decides what becomes of the source's tensors that the model class has no place for.

transformers leaves out the layers that predict further tokens (multi-token prediction: DeepSeek-V3, GLM-4.5, Qwen3-Next
and others). Servers use them for speculative decoding, so the result has them under their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import CarriedTensor, StoredTensor
from ..config import AwqOffloadConfig
from ..logs import get_logger
from ..model.decoder_layers import candidate_layers

logger = get_logger(__name__)

RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$")
"""Matches buffers that old checkpoints hold and models compute anew."""
MTP = re.compile(r"(^|[._])(mtp|nextn)([._]|$)", re.IGNORECASE)
"""Matches the names of layers for multi-token prediction, and of the config's fields that count them."""
LAYER = re.compile(r"(?:^|\.)(?P<stack>\w+)\.(?P<index>\d+)(?=\.)")
"""Matches an element of a list: a layer, or an expert within it."""
MOST_NAMED = 4


def carried(
    model: PreTrainedModel, recipe: AwqOffloadConfig, source: Source, unplaced: Sequence[str]
) -> dict[str, StoredTensor]:
    """Returns the tensors of the source to keep beside the model, and says which; drops what `recipe.mtp` drops.

    Where they are dropped, the fields of the model's config that count such layers become 0.
    """
    kept = carried_names(unplaced)
    mtp = set(mtp_tensors(model, kept))
    if recipe.mtp == "drop" and mtp:
        kept = [name for name in kept if name not in mtp]
        logger.warning(f"Dropped, as mtp='drop' says: {_listed(sorted(mtp))}, for multi-token prediction.")
        _promise_no_mtp(model)
    if kept:
        logger.warning(
            f"{type(model).__name__} has no place for {len(kept)} tensors of the checkpoint ({_listed(kept)}). The "
            "result keeps them as they are, in full precision."
        )
    return {name: source.tensors[name] for name in kept}


def carried_names(unplaced: Sequence[str]) -> list[str]:
    """Returns those of the tensors without a place that a model does not compute anew."""
    return [name for name in unplaced if not RECOMPUTED.search(name)]


def mtp_tensors(model: PreTrainedModel, unplaced: Sequence[str]) -> list[str]:
    """Returns the tensors of layers for multi-token prediction.

    They are called so ("mtp.layers.0.…"), or are decoder layers beyond the model's last one ("model.layers.61.…").
    """
    stacks: dict[str, int] = {}
    for layer_name in candidate_layers(model):
        stack, _, index = layer_name.rpartition(".")
        if index.isdigit():
            name = stack.rpartition(".")[2]
            stacks[name] = max(stacks.get(name, 0), int(index))
    found = []
    for name in unplaced:
        elements = [(part["stack"], int(part["index"])) for part in LAYER.finditer(name)]
        is_beyond = any(index > stacks.get(stack, index) for stack, index in elements)
        if is_beyond or MTP.search(name):
            found.append(name)
    return found


def _promise_no_mtp(model: PreTrainedModel) -> None:
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for name, value in config.to_dict().items():
            if MTP.search(name) and isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, 0)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return f"{shown} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else shown


def modules_of(tensors: Mapping[str, CarriedTensor]) -> list[str]:
    """Returns the names of modules among carried tensors that readers may take for linears: those with a matrix."""
    return sorted(
        name.removesuffix(".weight")
        for name, stored in tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    )
