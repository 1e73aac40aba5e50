"""A tensor of a source, whether a file has its very bytes or it is dequantized when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.source import StoredWeight
from .safetensors import TensorPlace, read_tensor


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
            "by the headers of its files. The checkpoint contradicts itself: get it again."
        )
    return tensor.pin_memory() if pin_memory else tensor


def files_of(stored: StoredTensor) -> list[Path]:
    """Returns the files that hold a tensor or its parts."""
    places = [stored] if isinstance(stored, TensorPlace) else list(stored.places.values())
    return list(dict.fromkeys(place.file for place in places))
