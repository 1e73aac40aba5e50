"""RAM or disk: where the full-precision weights are while a model is quantized, and the workplace that follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from .config import AwqOffloadConfig
from .data import CalibrationSet
from .errors import ConfigError
from .experts import UnfusedExperts
from .fingerprint import fingerprint
from .journal import Journal
from .logs import get_logger
from .offload_folder import OffloadFolder
from .safetensors_files import TensorPlace, read_tensor, tensor_places
from .stored_weights import StoredWeights
from .streaming import Onloader, default_execution_device
from .workplace import ToCheckpoint, Workplace

logger = get_logger(__name__)

RAM_SHARE = 0.8
"""A checkpoint of more than this share of the free RAM stays on the disk."""
HIDDEN_SHARE = 0.25
"""Hidden states of more than this share of the free RAM go to a file: twice their size is needed while a layer runs."""

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


def execution_device(recipe: AwqOffloadConfig) -> torch.device:
    """Where a decoder layer is processed."""
    return default_execution_device() if recipe.execution_device is None else torch.device(recipe.execution_device)


def free_ram_bytes(recipe: AwqOffloadConfig) -> int:
    """What may be used of the RAM: what is free, and no more than `max_memory` says."""
    available = int(psutil.virtual_memory().available)
    limit = recipe.memory_limit_bytes(torch.device("cpu"))
    return available if limit is None else min(available, limit)


def chosen_offload(recipe: AwqOffloadConfig, checkpoint_files: Sequence[str] | None, result_on_disk: bool) -> str:
    """ "cpu" or "disk"; where the quantized model is to stay on the disk, so does the one in full precision.

    Raises:
        ConfigError: the disk is asked for, but the checkpoint's files can't be read lazily.
    """
    files = [str(file) for file in checkpoint_files or ()]
    is_lazy = bool(files) and all(file.endswith(".safetensors") for file in files)
    wanted = "disk" if result_on_disk else recipe.offload
    if wanted == "disk" and not is_lazy:
        found = ", ".join(map(os.path.basename, files)) or "none"
        raise ConfigError(
            f"{'device_map has modules on' if result_on_disk else 'offload is'} 'disk', but the checkpoint's files are "
            f"{found}; weights can be read one by one from safetensors files only. Load the model and save it once "
            "with save_pretrained, or have everything on 'cpu' or an accelerator."
        )
    if wanted != "auto":
        return wanted
    size_bytes = sum(os.path.getsize(file) for file in files) if is_lazy else 0
    place = "disk" if size_bytes > RAM_SHARE * free_ram_bytes(recipe) else "cpu"
    if place == "disk":
        logger.info("The checkpoint has %.1f GiB; its weights stay on the disk.", size_bytes / 2**30)
    return place


def open_workplace(
    model: PreTrainedModel,
    recipe: AwqOffloadConfig,
    calibration: CalibrationSet | None,
    weights: StoredWeights | None,
    to_checkpoint: ToCheckpoint | None = None,
    files: Sequence[Path] | None = None,
    offload: OffloadFolder | None = None,
) -> Workplace:
    """Where `model` is quantized.

    Args:
        model: on the CPU; on the meta device where `weights` says where its weights are.
        recipe: device, prefetch, max_memory and checkpoint_dir are used.
        calibration: for the journal's fingerprint.
        weights: of a model on the meta device.
        to_checkpoint: streams, see `Workplace`.
        files: the source, for the journal's fingerprint; by default those of `weights`.
        offload: as in `Workplace`.

    Raises:
        JournalError: the journal in checkpoint_dir is of another run.
        ConfigError: a journal is asked for, but the model does not come from safetensors files.
    """
    journal = None
    if recipe.checkpoint_dir is not None:
        files = files or (weights.files if weights is not None else [])
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise ConfigError(
                f"checkpoint_dir is {os.fspath(recipe.checkpoint_dir)!r}, but the model does not come from safetensors "
                "files; a journal needs these to know the model again. Save it once with save_pretrained."
            )
        parts = fingerprint(model, recipe, calibration, files)
        journal = Journal(recipe.checkpoint_dir, parts | {"form": "in memory" if to_checkpoint is None else "streamed"})
        if journal.commits:
            logger.info("%d layers are in the journal %s.", len(journal.commits), journal.directory)
    onloader = Onloader(model, execution_device(recipe), weights, recipe.prefetch)
    spill_bytes = HIDDEN_SHARE * free_ram_bytes(recipe)
    return Workplace(onloader, journal, to_checkpoint, spill_bytes=spill_bytes, offload=offload)


def take_experts_apart(weights: StoredWeights, model: PreTrainedModel, fused: dict[str, Any]) -> None:
    """Let `weights` know of experts that the checkpoint holds fused and the model one by one."""
    for name, module in fused.items():
        experts = model.get_submodule(name)
        assert isinstance(experts, UnfusedExperts)
        weights.take_apart(name, module, experts)


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
