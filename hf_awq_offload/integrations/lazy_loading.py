"""RAM or disk: where the full-precision weights are while a model is quantized, and the workplace that follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..checkpoint.safetensors import TensorPlace, read_tensor, tensor_places
from ..config import AwqOffloadConfig
from ..errors import CheckpointError
from ..logs import get_logger
from ..offload.stored_weights import StoredWeights
from ..pipeline.run_storage import ToCheckpoint

logger = get_logger(__name__)

_only_loading: ContextVar[_Loading | None] = ContextVar("only_loading", default=None)


@contextmanager
def only_loading() -> Iterator[None]:
    """Inside, `from_pretrained` with a recipe prepares the model and leaves quantizing to the caller.

    transformers maps all files of a checkpoint into memory while it loads, and reads every tensor, also where all of
    them are to stay on the disk. Here it is given, in the place of safetensors' reader, one that opens nothing.
    """
    token = _only_loading.set(_Loading())
    reader = modeling_utils.safe_open
    modeling_utils.safe_open = _LazyFile  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        modeling_utils.safe_open = reader  # type: ignore[misc]
        _only_loading.reset(token)


def is_only_loading() -> bool:
    return _only_loading.get() is not None


def stays_on_disk(model: PreTrainedModel, quantizer: Any) -> None:
    """If transformers only loads: `model` is what it loads."""
    loading = _only_loading.get()
    if loading is None:
        return
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def is_as_stored(name: str) -> bool:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return pattern is None and renamed in parameters

    loading.is_as_stored = is_as_stored


class _Loading:
    """What `_LazyFile` has to know of the model."""

    is_as_stored: Callable[[str], bool] = staticmethod(lambda name: False)
    """Whether a tensor of the checkpoint is a parameter of the model, and no buffer, and nothing is converted to it."""


class _LazyFile:
    """Gives transformers what it asks of an open safetensors file."""

    def __init__(self, file: str, *args: Any, **kwargs: Any):
        self.places = tensor_places(file)

    def keys(self) -> list[str]:
        return list(self.places)

    def get_slice(self, name: str) -> _LazyTensor:
        return _LazyTensor(name, self.places[name])

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""


class _LazyTensor:
    """In the place of a tensor; transformers takes it by `[...]`."""

    def __init__(self, name: str, place: TensorPlace):
        self.name, self.place = name, place

    def __getitem__(self, everything: Any) -> Tensor:
        loading = _only_loading.get()
        if loading is not None and loading.is_as_stored(self.name):  # looked at for its shape, and dropped
            return torch.zeros((), dtype=self.place.torch_dtype).expand(self.place.shape)
        return read_tensor(self.place)


def load_on_meta(
    src: str | os.PathLike[str], recipe: AwqOffloadConfig, model_class: Any, dtype: Any, folder: Path, kwargs: Any
) -> PreTrainedModel:
    """As transformers builds it, its weights left in the files; those that transformers converts go to `folder`."""
    with only_loading():
        return model_class.from_pretrained(
            src, quantization_config=recipe, dtype=dtype, offload_folder=str(folder), **kwargs
        )


def to_checkpoint_names(model: PreTrainedModel) -> ToCheckpoint:
    """What `save_pretrained` makes of names and tensors."""
    state = dict(model.state_dict())
    kept = remove_tied_weights_from_state_dict(dict(state), model)
    left_out = (state.keys() - kept.keys()) | set(model._keys_to_ignore_on_save or ())

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(model, {name: t for name, t in tensors.items() if name not in left_out})

    return convert


def detach_stored_weights(model: PreTrainedModel) -> StoredWeights:
    """Where the weights of a model are that transformers left on the disk; its hooks, which would read them, go."""
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
    return StoredWeights(loader.index, dtypes, loader.save_folder)


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Give parameters that a model wants in fp32 that dtype; transformers does so only for what it loads itself."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for name, parameter in model.named_parameters():
        if parameter.is_meta and pattern.search(name):
            parameter.data = parameter.data.float()
