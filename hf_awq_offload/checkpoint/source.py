"""Opens the checkpoint that is to be quantized, as the full-precision tensors that it stands for.

Only headers are read. What is damaged, contradicts itself or cannot be understood is refused here, before any weight is
loaded: a safetensors file that is cut off, an index that names other tensors than the files hold, a quantization that
this package cannot undo.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats.source import SourceFormat, StoredHeader, source_format
from .file_states import FileStates
from .opened import CONFIG_NAME, quantization_fields, read_json, require_fields, weight_map
from .safetensors import TensorPlace, read_tensor, tensor_places
from .stored_tensor import DequantizedTensor, StoredTensor

ADAPTER_CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """The safetensors files of a checkpoint that is to be quantized."""

    files: tuple[Path, ...]
    fields: Mapping[str, Any] | None
    """The quantization config in config.json."""
    format: SourceFormat | None
    """How the weights are quantized; None: they are in full precision."""
    tensors: dict[str, StoredTensor]
    """Every full-precision tensor by its name in the checkpoint."""
    states: FileStates = field(default_factory=FileStates, compare=False)
    """What the files were like when their headers were read."""

    @cached_property
    def by_file(self) -> dict[Path, dict[str, StoredTensor]]:
        """File -> the tensors that it holds, or holds the first part of."""
        found: dict[Path, dict[str, StoredTensor]] = {file: {} for file in self.files}
        for name, stored in self.tensors.items():
            found[stored.file][name] = stored
        return found

    @property
    def dequantized_bytes(self) -> int | None:
        """Bytes of all tensors in half precision; None if the source is not quantized, and its files say it."""
        if self.format is None:
            return None
        return sum(math.prod(stored.shape) * min(stored.torch_dtype.itemsize, 2) for stored in self.tensors.values())

    @property
    def unused(self) -> tuple[str, ...]:
        """Stored tensors that full precision has no use for, such as scales of activations."""
        return () if self.format is None else self.format.unused


def open_source(files: Sequence[Path], fields: Mapping[str, Any] | None = None, index: Path | None = None) -> Source:
    """Opens the safetensors files of a checkpoint.

    Args:
        files: all of them.
        fields: the quantization config, if config.json has one.
        index: the JSON file that says which file holds which tensor, if there are several files.

    Raises:
        CheckpointError: a file is missing or damaged, the index contradicts the files, or the weights are quantized in
            a way that this package cannot undo.
    """
    places: dict[str, TensorPlace] = {}
    states = FileStates(files)
    for file in files:
        held = tensor_places(file)
        if twice := sorted(held.keys() & places.keys()):
            raise CheckpointError(
                f"{twice[0]} is both in {places[twice[0]].file.name} and in {file.name}; expected each tensor once. "
                "The files are of two checkpoints: remove those that do not belong to this one, or download it again."
            )
        places |= held
    if index is not None:
        _check_index(index, places)
    headers = {name: StoredHeader(place.dtype, place.shape) for name, place in places.items()}
    found = source_format(headers, fields, lambda name: read_tensor(places[name]))
    if found is None:
        return Source(tuple(files), fields, None, dict(places), states)
    in_parts = {part for weight in found.weights for part in weight.parts.values()}
    tensors: dict[str, StoredTensor] = {
        name: place for name, place in places.items() if name not in in_parts and name not in found.unused
    }
    for weight in found.weights:
        if weight.name in tensors:
            raise CheckpointError(
                f"The checkpoint holds {weight.name} twice, quantized and in full precision. Remove one of them."
            )
        tensors[weight.name] = DequantizedTensor(weight, {part: places[name] for part, name in weight.parts.items()})
    return Source(tuple(files), fields, found, tensors, states)


def _check_index(index: Path, places: Mapping[str, TensorPlace]) -> None:
    """Raises CheckpointError unless the index names each tensor, in the file that holds it, and no other."""
    entries = weight_map(index)
    lost = sorted(name for name, file in entries.items() if name not in places or places[name].file.name != file)
    if lost:
        raise CheckpointError(
            f"{index.name} says that {lost[0]} is in {entries[lost[0]]}, which does not hold it"
            f"{_and_more(lost)}. The download is incomplete, or the files are of two checkpoints: download it again."
        )
    unnamed = sorted(places.keys() - entries.keys())
    if unnamed:
        raise CheckpointError(
            f"{places[unnamed[0]].file.name} holds {unnamed[0]}, which {index.name} does not name{_and_more(unnamed)}. "
            "Some readers would load it and others not: download the checkpoint again, or add it to the index."
        )


def fields_beside(file: Path) -> Mapping[str, Any] | None:
    """Returns the quantization config in the config.json beside a file, or None; also that of a text model within."""
    path = file.parent / CONFIG_NAME
    if not path.is_file():
        return None
    config = read_json(path)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        require_fields(part)
    return quantization_fields(config) or (quantization_fields(text) if isinstance(text, dict) else None)


def _and_more(names: Sequence[str]) -> str:
    return f", and so for {len(names) - 1} more" if names[1:] else ""
