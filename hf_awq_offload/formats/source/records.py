"""How a quantized checkpoint stores its weights, and a view of its headers that checks what it hands out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...errors import CheckpointError

FLOATS = ("F32", "BF16", "F16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
REMEDY = "Load it with the tool that made it, dequantize and save it in full precision there, and quantize the result."


class StoredHeader(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str  # as safetensors spells it: "F8_E4M3", "U8", "BF16" …
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredWeight:
    """How a quantized checkpoint stores one full-precision tensor."""

    name: str
    """The virtual full-precision tensor, e.g. "model.layers.0.mlp.up_proj.weight"."""
    parts: Mapping[str, str]
    """Role -> name of the stored tensor, e.g. {"weight": "….weight", "scale": "….weight_scale_inv"}."""
    shape: tuple[int, ...]
    """Shape of the full-precision tensor."""
    dtype: torch.dtype
    """In which `dequantize` returns it."""
    dequantize: Callable[[Mapping[str, Tensor]], Tensor]
    """Role -> tensor on the CPU; returns a contiguous tensor."""


@dataclass(frozen=True)
class SourceFormat:
    """How a quantized checkpoint stores its weights."""

    name: str
    """For people, e.g. "fp8 (blocks of 128 × 128)"."""
    bits: int
    """Per stored weight; the lowest if there are several."""
    is_native: bool
    """Whether those who trained the model published it so: quantizing again adds no second loss."""
    weights: tuple[StoredWeight, ...]
    unused: tuple[str, ...]
    """Stored tensors that full precision has no use for, such as scales of activations."""


class Recognized(NamedTuple):
    """A weight that a module of this package has recognized."""

    weight: StoredWeight
    label: str  # for people, e.g. "fp8 (blocks of 128 × 128)"
    bits: int
    is_native: bool = False


@dataclass
class Claims:
    """What has been recognized so far: weights, and tensors that full precision has no use for."""

    recognized: list[Recognized] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Every stored tensor that is accounted for."""
        return {part for item in self.recognized for part in item.weight.parts.values()} | self.unused.keys()


@dataclass(frozen=True)
class Stored:
    """The headers of a checkpoint, the config's fields, and access to small tensors."""

    headers: Mapping[str, StoredHeader]
    fields: Mapping[str, Any]
    read: Callable[[str], Tensor]

    def require(
        self,
        name: str,
        owner: str,  # the tensor that can't be read without this one
        dtypes: Collection[str],
        ndim: int | None = None,
    ) -> StoredHeader:
        """Returns the header of a tensor that must be there.

        Raises:
            CheckpointError: it is missing, or has another dtype or number of dimensions, or an empty dimension.
        """
        header = self.headers.get(name)
        if header is None:
            raise CheckpointError(
                f"{owner} is quantized, but the checkpoint has no {name}, without which it can't be dequantized. "
                "Download or copy all files of the checkpoint again."
            )
        if header.dtype not in dtypes or (ndim is not None and len(header.shape) != ndim) or 0 in header.shape:
            dimensions = "" if ndim is None else f" with {ndim} dimensions"
            contradicts(f"{name} is {described(header)}", f"{' or '.join(dtypes)}{dimensions}")
        return header


def described(header: StoredHeader) -> str:
    """A header for a message, e.g. "U8 of (2, 3)"."""
    return f"{header.dtype} of {tuple(header.shape)}"


def contradicts(found: str, expected: str) -> NoReturn:
    """Raises CheckpointError: a stored tensor contradicts another one, or the config."""
    raise CheckpointError(f"The quantized checkpoint contradicts itself: {found}; expected {expected}. {REMEDY}")


def unsupported(found: str) -> NoReturn:
    """Raises CheckpointError: this package can't read a kind of quantized checkpoint."""
    raise CheckpointError(f"This package can't read the quantized checkpoint: {found}. {REMEDY}")


def value_of(
    fields: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    default: Any,
) -> Any:
    """A field of the config; raises CheckpointError if it has another type. None counts as absent."""
    value = fields.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        contradicts(f"{key} in the quantization_config is {value!r}", " or ".join(kind.__name__ for kind in kinds))
    return value
