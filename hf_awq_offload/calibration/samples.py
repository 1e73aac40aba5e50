"""Reads a processor's output as calibration data: token ids with pixels and other arguments of the forward pass.

The argument names of the model's forward pass determine which columns of a row belong to a sample. A sample is run as
it is. It cannot be cut, because its image tokens have to match its pixels, and a batch of several texts and images
stays together, including its padding and attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationDataError

IGNORED_LABEL = -100
TEXT_COLUMNS = frozenset(("input_ids", "attention_mask", "loss_mask", "labels"))

MEDIA = ("image", "video", "audio")
"""The types of message parts that are not text."""


class Sample(NamedTuple):
    """The output of a processor, which forms one micro-batch."""

    row: int
    inputs: dict[str, Any]  # arguments of the forward pass on the CPU, including input_ids (batch, tokens) int64
    counted: Tensor | None  # (batch, tokens) bool: which tokens enter the statistics; None = all

    @property
    def token_ids(self) -> Tensor:
        """The token ids of all texts without padding, (tokens,) int64."""
        ids, mask = self.inputs["input_ids"], self.inputs.get("attention_mask")
        return ids.flatten() if mask is None else ids[mask != 0]


def sample_of(row: int, columns: Mapping[str, Any], accepts: frozenset[str]) -> Sample | None:
    """Returns the row as a sample, or None if it holds nothing but text.

    Args:
        row: the number of the row, for errors.
        columns: the row's values by column name.
        accepts: argument names of the model's forward pass.

    Raises:
        CalibrationDataError: the row has pixels that the model does not take, no usable input_ids, or a value that is
            not an array.
    """
    foreign = [name for name, value in columns.items() if name not in accepts | TEXT_COLUMNS and _is_media(value)]
    if foreign:
        raise CalibrationDataError(
            f"Row {row} of the dataset holds {foreign[0]!r}, which the model's forward pass does not take; it takes "
            f"{', '.join(sorted(accepts))}. Use the model's own processor, or remove that column."
        )
    names = [name for name in columns if name in accepts - TEXT_COLUMNS and columns[name] is not None]
    ids_shape = _shape(columns["input_ids"])
    extras = {name: _as_input(row, name, columns[name]) for name in names if _shape(columns[name]) != ids_shape}
    if not extras:
        return None  # the model computes token types and positions of text itself
    per_token = {name: _as_input(row, name, columns[name]) for name in names if name not in extras}
    ids = _token_ids(row, columns["input_ids"])
    inputs = {"input_ids": ids, **per_token, **extras}
    counted = torch.ones_like(ids, dtype=torch.bool)
    for name, is_counted in (
        ("attention_mask", lambda values: values != 0),
        ("loss_mask", lambda values: values != 0),
        ("labels", lambda values: values != IGNORED_LABEL),
    ):
        if columns.get(name) is None or (name == "labels" and columns.get("loss_mask") is not None):
            continue
        values = _as_input(row, name, columns[name])
        if not isinstance(values, Tensor) or values.shape != ids.shape:
            raise CalibrationDataError(
                f"Row {row}: {name} has the shape {_shape(columns[name])}, input_ids {tuple(ids.shape)}; expected one "
                f"value per token. Correct {name} or remove that column."
            )
        if name == "attention_mask":
            inputs[name] = values
        counted &= is_counted(values)
    return Sample(row, inputs, None if bool(counted.all()) else counted)


def media_without_text(columns: Mapping[str, Any], accepts: frozenset[str]) -> str | None:
    """Returns the column of a row without input_ids that only a processor can have made, if there is one."""
    if "input_ids" in columns:
        return None
    return next((name for name, value in columns.items() if name in accepts and _is_media(value)), None)


def has_media(messages: list[dict[str, Any]]) -> bool:
    """Returns whether a conversation holds images, videos or sound."""
    parts = [part for turn in messages if isinstance(turn.get("content"), list | tuple) for part in turn["content"]]
    return any(isinstance(part, Mapping) and part.get("type") in MEDIA for part in parts)


def _token_ids(row: int, value: Any) -> Tensor:
    ids = _as_input(row, "input_ids", value)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
        given = f"a {type(value).__name__} of shape {_shape(value)}"
        raise CalibrationDataError(
            f"Row {row}: input_ids is {given}; in a row with images or sound, expected token ids of shape (batch, "
            'tokens), as a processor returns them with return_tensors="pt".'
        )
    return ids.long()


def _is_media(value: Any) -> bool:
    """Returns whether `value` is a floating-point array of two or more dimensions, such as pixels or spectra."""
    while isinstance(value, list | tuple) and len(value) and isinstance(value[0], list | tuple | Tensor | np.ndarray):
        if isinstance(value[0], list | tuple) and len(value[0]) and isinstance(value[0][0], float):
            return True
        value = value[0]
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.ndim >= 2
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim >= 2


def _shape(value: Any) -> tuple[int, ...] | None:
    """Returns the shape, or None if nested lists differ in length."""
    if isinstance(value, Tensor | np.ndarray):
        return tuple(value.shape)
    try:
        return np.shape(value)
    except ValueError:
        return None


def _as_input(row: int, name: str, value: Any) -> Any:
    """Converts `value` to a tensor on the CPU, or to a list of tensors if its entries differ in shape."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor | np.ndarray) for item in value):
        return [_as_input(row, name, item) for item in value]
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return [_as_input(row, name, item) for item in value]
    if array.dtype.kind not in "iufb":
        raise CalibrationDataError(
            f"Row {row}, column {name!r}, holds values of type {array.dtype}; expected numbers, as a processor returns "
            'them with return_tensors="pt".'
        )
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64))
