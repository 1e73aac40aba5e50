"""Has transformers build a model without reading its weights, and finds them again when they are needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..checkpoint.source import Source
from ..config import AwqOffloadConfig
from ..errors import CheckpointError
from ..offload.stored_weights import StoredWeights
from ..pipeline.run_storage import ToCheckpoint
from .load_call import only_loading


def load_on_meta(
    src: str | os.PathLike[str], recipe: AwqOffloadConfig, model_class: Any, dtype: Any, folder: Path, kwargs: Any
) -> PreTrainedModel:
    """Returns the model with its weights left in the files; weights that transformers converts go to `folder`."""
    with only_loading():
        return model_class.from_pretrained(
            src, quantization_config=recipe, dtype=dtype, offload_folder=str(folder), **kwargs
        )


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
    missing = [name for name, _ in model.named_parameters() if name not in loader.index]
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
    return StoredWeights(loader.index, dtypes, loader.save_folder, source)


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Casts the parameters that a model wants in fp32; transformers does so only for those that it loads itself."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for name, parameter in model.named_parameters():
        if parameter.is_meta and pattern.search(name):
            parameter.data = parameter.data.float()
