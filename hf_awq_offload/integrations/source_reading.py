"""Has transformers read a source through this package: dequantized, or not at all where its weights stay on the disk.

transformers maps all files of a checkpoint into memory while it loads, and reads every tensor, even where all of them
are to stay on the disk. What is quantized it reads as it is stored. `read_through_sources` puts a reader in its place,
which serves calls with a recipe only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from ..checkpoint.safetensors import tensor_places
from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import StoredTensor, read
from ..config import QUANT_METHOD, AwqOffloadConfig
from ..errors import CheckpointError
from .load_call import current_call
from .source_fit import SourceFit


class SourceReading:
    """Decides what transformers gets to see of a source's tensors.

    Args:
        source: the source.
        as_stored: its tensors that become parameters of the model without any conversion.
        is_lazy: whether weights stay on the disk; asked when transformers reads.
    """

    def __init__(self, source: Source, as_stored: set[str], is_lazy: Callable[[], bool]):
        self.source, self.as_stored, self.is_lazy = source, as_stored, is_lazy
        self.was_used = False

    def serves(self, file: str) -> bool:
        """Whether transformers should read this file through `open`."""
        return Path(file) in self.source.by_file and (self.source.format is not None or self.is_lazy())

    def open(self, file: str) -> _SourceFile:
        """Returns what transformers takes for an open safetensors file."""
        self.was_used = True
        return _SourceFile(self, self.source.by_file[Path(file)])

    def tensor(self, name: str, stored: StoredTensor) -> Tensor:
        """Returns a tensor. Only its shape and dtype are right if it is a parameter that stays on the disk.

        transformers drops such tensors. It needs the values of buffers, and of what it converts.
        """
        if self.is_lazy() and name in self.as_stored:
            return torch.zeros((), dtype=stored.torch_dtype).expand(stored.shape)
        return read(stored)

    def require_use(self) -> None:
        """Raises CheckpointError if transformers has read a quantized source without this reader."""
        if self.source.format is not None and not self.was_used:
            raise CheckpointError(
                f"The checkpoint's weights are {self.source.format.name}, and transformers has read them as they are "
                "stored: with disable_mmap=True, or from a mounted hub folder, it opens files in a way of its own. "
                "Leave disable_mmap out, and load from a folder on this machine."
            )


class _SourceFile:
    """Gives transformers what it asks of an open safetensors file."""

    def __init__(self, reading: SourceReading, tensors: Mapping[str, StoredTensor]):
        self.reading, self.tensors = reading, tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> _SourceTensor:
        return _SourceTensor(self.reading, name, self.tensors[name])

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""


class _SourceTensor:
    """Stands for a tensor of a file until transformers takes it by `[...]`."""

    def __init__(self, reading: SourceReading, name: str, stored: StoredTensor):
        self.reading, self.name, self.stored = reading, name, stored

    def __getitem__(self, everything: Any) -> Tensor:
        return self.reading.tensor(self.name, self.stored)


def read_source(source: Source, found: SourceFit, model: PreTrainedModel, is_lazy: Callable[[], bool]) -> None:
    """Has transformers read a source through this package from here on, in the current call.

    Args:
        source: the source.
        found: how its tensors correspond to the model's.
        model: the model that is loaded.
        is_lazy: whether weights stay on the disk; asked when transformers reads.
    """
    call = current_call()
    if call is not None:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        as_stored = {stored for name, stored in found.placed.items() if name in parameters}
        call.reading = SourceReading(source, as_stored, is_lazy)


def end_reading() -> None:
    """Leaves to transformers whatever it reads from here on, such as adapters.

    Raises:
        CheckpointError: it has read a quantized source as it is stored.
    """
    call = current_call()
    if call is not None and call.reading is not None:
        call.reading.require_use()
        call.reading = None


def read_through_sources() -> None:
    """Puts this module's reader into transformers; call it once."""
    patched: Any = modeling_utils
    patched.safe_open = _safe_open(patched.safe_open)
    patched.accelerate_disk_offload = _accelerate_disk_offload(patched.accelerate_disk_offload)
    patched.get_hf_quantizer = _get_hf_quantizer(patched.get_hf_quantizer)


def _safe_open(original: Callable[..., Any]) -> Callable[..., Any]:
    def safe_open(file: str, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return original(file, *args, **kwargs)
        if call.reading is None:  # transformers looks for a dtype
            tensor_places(file)  # says what is wrong with a damaged file
        elif call.reading.serves(file):
            return call.reading.open(file)
        return original(file, *args, **kwargs)

    return safe_open


def _accelerate_disk_offload(original: Callable[..., Any]) -> Callable[..., Any]:
    def accelerate_disk_offload(
        model: Any, folder: Any, files: Any, device_map: Any, sharded_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = current_call()
        if call is not None and call.reading is not None and call.reading.source.format is not None:
            names = {name: str(stored.file.name) for name, stored in call.reading.source.tensors.items()}
            sharded_metadata = {"weight_map": names}
        return original(model, folder, files, device_map, sharded_metadata, *args, **kwargs)

    return accelerate_disk_offload


def _get_hf_quantizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hides the source's own quantization, which transformers refuses beside a recipe, and keeps it for us."""

    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is not None and isinstance(quantization_config, AwqOffloadConfig):
            for part in (config, config.get_text_config(decoder=True)):
                found = getattr(part, "quantization_config", None)
                if found is not None and _method(found) != QUANT_METHOD:
                    call.quantization = found if isinstance(found, dict) else found.to_dict()
                    del part.quantization_config
        return original(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def _method(quantization: Any) -> Any:
    found = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return getattr(found, "value", found)
