"""Has transformers build a model without reading its weights, and finds them again when they are needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.hooks import remove_hook_from_submodules
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import are_equal
from ..config import AwqOffloadConfig
from ..errors import CheckpointError, StorageError
from ..logs import get_logger, with_own_bars_alone, without_offload_message
from ..offload.stored_weights import StoredWeights
from ..pipeline.run_storage import ToCheckpoint
from .load_call import only_loading

logger = get_logger(__name__)


def load_on_meta(
    src: str | os.PathLike[str],
    recipe: AwqOffloadConfig,
    model_class: Any,
    dtype: Any,
    folder: Path,
    kwargs: Any,
    to_quantize: bool = True,
) -> PreTrainedModel:
    """Returns the model with its weights left in the files; weights that transformers converts go to `folder`.

    Without `to_quantize`, nothing is prepared for quantizing it.

    Raises:
        StorageError: `folder` can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing is loaded that bars could count.
        with only_loading(to_quantize), without_offload_message(), with_own_bars_alone():
            return model_class.from_pretrained(
                src, quantization_config=recipe, dtype=dtype, offload_folder=str(folder), **kwargs
            )
    except (OSError, SafetensorError) as error:
        is_in_folder = str(getattr(error, "filename", None) or "").startswith(str(folder))
        if not is_in_folder and not (isinstance(error, SafetensorError) and "I/O error" in str(error)):
            raise
        raise StorageError(
            f"Weights that transformers converts can't be written to {folder}: {error}. Make room or correct the "
            "folder's permissions, and repeat the call."
        ) from error


def to_checkpoint_names(model: PreTrainedModel) -> ToCheckpoint:
    """Returns a function that converts names and tensors as `save_pretrained` does."""
    state = dict(model.state_dict())
    kept = remove_tied_weights_from_state_dict(dict(state), model)
    left_out = (state.keys() - kept.keys()) | set(model._keys_to_ignore_on_save or ())

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(model, {name: t for name, t in tensors.items() if name not in left_out})

    return convert


def detach_stored_weights(model: PreTrainedModel, source: Source | None) -> StoredWeights:
    """Returns where transformers has left a model's weights on the disk, and removes the hooks that would read them.

    `source` has the tensors of the checkpoint itself; others were written while transformers converted them.

    Raises:
        CheckpointError: the checkpoint lacks a weight of the model.
    """
    loader = next(
        loader
        for part in model.modules()
        if (loader := getattr(getattr(part, "_hf_hook", None), "weights_map", None)) is not None
    )
    while hasattr(loader, "dataset"):  # a view of one with a prefix
        loader = loader.dataset
    index = dict(loader.index)
    for target, tied_to in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in index:
            index.setdefault(tied_to, index[target])  # transformers ties either way round
    missing = [name for name, _ in model.named_parameters() if name not in index]
    if missing:
        raise CheckpointError(
            f"The checkpoint holds no {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}; expected "
            "every weight of the model, to read it when it is needed. Download it again, or set offload='cpu' to have "
            "transformers initialize what is missing."
        )
    remove_hook_from_submodules(model)
    for part in model.modules():
        forward = vars(part).get("forward")
        if getattr(forward, "__func__", None) is type(part).forward:
            del part.forward  # accelerate puts the class's method back as an instance attribute
    vars(model).pop("hf_device_map", None)
    _keep_in_fp32(model)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    weights = StoredWeights(index, dtypes, loader.save_folder, source)
    _settle_ties(model, weights)
    return weights


def _settle_ties(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Ties weights of which the files hold both, if they are equal.

    That is what transformers does with weights in memory. Those on the disk it leaves as they are, neither tied nor
    exempt from `tie_weights`, which would lose one of two that differ.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, tied_to in list(ties.items()):
        if target not in weights.places or tied_to not in weights.places:
            continue
        first, second = weights.places[target], weights.places[tied_to]
        if first == second or are_equal(first, second, weights.dtypes[tied_to]):
            parent, _, name = target.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_parameter_or_buffer(tied_to))
        else:
            ties.pop(target)
            logger.warning(
                f"config.json says that {target} is {tied_to}, and the checkpoint holds two of different values. Both "
                "are kept. Set tie_word_embeddings=False in config.json: servers may follow it, and use one for both."
            )


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Casts the parameters that a model wants in fp32; transformers does so only for those that it loads itself."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for name, parameter in model.named_parameters():
        if parameter.is_meta and pattern.search(name):
            parameter.data = parameter.data.float()
