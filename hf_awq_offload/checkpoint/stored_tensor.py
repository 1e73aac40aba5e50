"""A tensor of a source, whether a file has its very bytes or it is dequantized when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.dtypes import SPELLINGS
from ..formats.source import StoredWeight
from .safetensors import TensorPlace, read_tensor, tensor_places, writing

PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class DequantizedTensor:
    """A full-precision tensor that a quantized checkpoint stores in parts: integers, scales and the like."""

    weight: StoredWeight
    places: Mapping[str, TensorPlace]
    """Part, as the format calls it -> where it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in which the arithmetic ends; the model's own may be another."""
        return self.weight.dtype

    @property
    def file(self) -> Path:
        """The file that holds the first part."""
        return next(iter(self.places.values())).file


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory, and in no file."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.value.dtype


StoredTensor = TensorPlace | DequantizedTensor
CarriedTensor = StoredTensor | HeldTensor
"""A tensor that a result is to hold beside the model's own."""


def read(stored: StoredTensor, pin_memory: bool = False) -> Tensor:
    """Reads a tensor into memory of its own, dequantized if it is stored in parts.

    Raises:
        CheckpointError: a file has become shorter, or torch lacks a dtype.
    """
    if isinstance(stored, TensorPlace):
        return read_tensor(stored, pin_memory)
    tensor = stored.weight.dequantize({part: read_tensor(place) for part, place in stored.places.items()})
    if tuple(tensor.shape) != stored.shape:
        raise CheckpointError(
            f"{stored.weight.name} has the shape {tuple(tensor.shape)} once it is dequantized; expected {stored.shape} "
            "by the headers of its files. The checkpoint contradicts itself: download it again."
        )
    return tensor.pin_memory() if pin_memory else tensor


def require_unchanged(tensors: Mapping[str, CarriedTensor]) -> None:
    """Raises CheckpointError if a file of a tensor is gone or holds something else where the tensor was."""
    held: dict[Path, dict[str, TensorPlace]] = {}
    for name, stored in tensors.items():
        places: dict[str, TensorPlace] = {}
        if isinstance(stored, TensorPlace):
            places = {name: stored}
        elif isinstance(stored, DequantizedTensor):
            places = {stored.weight.parts[part]: place for part, place in stored.places.items()}
        for stored_name, place in places.items():
            if place.file not in held:
                if not place.file.is_file():
                    raise CheckpointError(
                        f"{place.file}, which holds {name}, is gone. Put it back, and save the model again."
                    )
                held[place.file] = tensor_places(place.file)
            if held[place.file].get(stored_name) != place:
                raise CheckpointError(
                    f"{place.file}, which held {name}, has been changed since the model was loaded. Put the file of "
                    "that time back, and save the model again."
                )


def write_all(
    file: Path, tensors: Mapping[str, CarriedTensor], dtype: torch.dtype = torch.float32, flush: bool = True
) -> None:
    """Writes a safetensors file, one tensor at a time in memory.

    Args:
        file: where.
        tensors: by name. What a file holds is copied byte by byte.
        dtype: of what is dequantized.
        flush: make the file durable.

    Raises:
        CheckpointError: a source file has changed.
        OSError: the file can't be written.
    """
    layout = {name: (_dtype_in_file(stored, dtype), stored.shape) for name, stored in tensors.items()}
    with writing(file, layout, flush) as opened:
        for name, stored in tensors.items():
            if isinstance(stored, TensorPlace):
                opened.copy(name, stored)
            elif isinstance(stored, HeldTensor):
                opened.write(name, stored.value.cpu())
            else:
                opened.write(name, read(stored).to(dtype))


def _dtype_in_file(stored: CarriedTensor, dtype: torch.dtype) -> str:
    """Returns the dtype in which a tensor is written, as safetensors spells it; `dtype` is that of dequantized ones."""
    if isinstance(stored, TensorPlace):
        return stored.dtype
    return SPELLINGS[stored.torch_dtype if isinstance(stored, HeldTensor) else dtype]


def are_equal(first: StoredTensor, second: StoredTensor, dtype: torch.dtype) -> bool:
    """Returns whether two tensors have the same values in `dtype`; bytes in files are compared piece by piece."""
    if first.shape != second.shape:
        return False
    if isinstance(first, TensorPlace) and isinstance(second, TensorPlace) and first.dtype == second.dtype:
        return _have_same_bytes(first, second)
    return torch.equal(read(first).to(dtype), read(second).to(dtype))


def _have_same_bytes(first: TensorPlace, second: TensorPlace) -> bool:
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.end - first.start
        while left > 0:
            size = min(left, PIECE_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def files_of(stored: CarriedTensor) -> list[Path]:
    """Returns the files that hold a tensor or its parts; none if it is in memory."""
    if isinstance(stored, HeldTensor):
        return []
    places = [stored] if isinstance(stored, TensorPlace) else list(stored.places.values())
    return list(dict.fromkeys(place.file for place in places))
