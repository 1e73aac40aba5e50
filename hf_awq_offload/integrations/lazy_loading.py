"""Has transformers build a model without reading its weights, and finds them again when they are needed.

transformers maps all files of a checkpoint into memory while it loads, and reads every tensor, even where all of them
are to stay on the disk. Inside `only_loading` it is given a reader of safetensors files that opens nothing.
"""

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
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.safetensors import TensorPlace, read_tensor, tensor_places
from ..config import AwqOffloadConfig
from ..errors import CheckpointError
from ..offload.stored_weights import StoredWeights
from ..pipeline.run_storage import ToCheckpoint


@contextmanager
def only_loading() -> Iterator[None]:
    """Lets `from_pretrained` with a recipe prepare a model inside the context, and leave quantizing to the caller."""
    token = _lazy_reading.set(_LazyReading())
    reader = modeling_utils.safe_open
    modeling_utils.safe_open = _LazyFile  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        modeling_utils.safe_open = reader  # type: ignore[misc]
        _lazy_reading.reset(token)


def is_only_loading() -> bool:
    """Whether this runs inside `only_loading`."""
    return _lazy_reading.get() is not None


def note_what_is_stored(model: PreTrainedModel, quantizer: HfQuantizer) -> None:
    """Tells the lazy reader, if there is one, which model transformers is about to load."""
    lazy_reading = _lazy_reading.get()
    if lazy_reading is not None:
        lazy_reading.learn(model, quantizer)


class _LazyReading:
    """Knows which tensors of a checkpoint need not be read, because nothing is computed from them."""

    def __init__(self) -> None:
        self._is_as_stored: Callable[[str], bool] = lambda name: False

    def learn(self, model: PreTrainedModel, quantizer: HfQuantizer) -> None:
        conversions = get_model_conversion_mapping(model, None, quantizer)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

        def is_as_stored(name: str) -> bool:
            renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            return pattern is None and renamed in parameters

        self._is_as_stored = is_as_stored

    def tensor(self, name: str, place: TensorPlace) -> Tensor:
        """Returns a tensor to look at; only its shape and dtype are right if it is a parameter of the model as stored.

        transformers drops such tensors. It needs the values of buffers, and of what it converts.
        """
        if self._is_as_stored(name):
            return torch.zeros((), dtype=place.torch_dtype).expand(place.shape)
        return read_tensor(place)


_lazy_reading: ContextVar[_LazyReading | None] = ContextVar("lazy_reading", default=None)


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
    """Stands for a tensor of a file until transformers takes it by `[...]`."""

    def __init__(self, name: str, place: TensorPlace):
        self.name, self.place = name, place

    def __getitem__(self, everything: Any) -> Tensor:
        lazy_reading = _lazy_reading.get()
        return read_tensor(self.place) if lazy_reading is None else lazy_reading.tensor(self.name, self.place)


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


def detach_stored_weights(model: PreTrainedModel) -> StoredWeights:
    """Returns where transformers has left a model's weights on the disk, and removes the hooks that would read them.

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
    return StoredWeights(loader.index, dtypes, loader.save_folder)


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Casts the parameters that a model wants in fp32; transformers does so only for those that it loads itself."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for name, parameter in model.named_parameters():
        if parameter.is_meta and pattern.search(name):
            parameter.data = parameter.data.float()
