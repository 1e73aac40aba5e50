"""Turns the elements of a data set into documents: text, conversations, or rows of token ids.

Rows are counted from 0. Error messages never quote the text of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationDataError
from ..messages import type_name
from .conversations import COLUMNS, is_conversation, turns_of
from .samples import IGNORED_LABEL, Sample, media_without_text, sample_of

_ROW_COLUMNS = (
    "'input_ids', 'messages', 'text', 'conversations', a single column of strings, or the one named by text_column"
)


class Text(NamedTuple):
    """A document of running text; documents are concatenated."""

    row: int
    text: str


class Chat(NamedTuple):
    """A conversation that the tokenizer's chat template renders to one sequence."""

    row: int
    messages: list[dict[str, Any]]
    images: Any = None  # pictures in a separate column, to which the messages refer


class TokenRow(NamedTuple):
    """Token ids without padding that form one sequence."""

    row: int
    token_ids: Tensor  # (tokens,) int64
    counted: Tensor | None  # (tokens,) bool; None = all
    padding_tokens: int  # number of padding tokens that were removed


Document = Text | Chat | TokenRow | Sample


def read_documents(
    elements: Iterable[tuple[int, Any]],  # (row, element)
    text_column: str | None,
    string_columns: list[str] | None,  # None: taken from the first row
    accepts: frozenset[str] = frozenset(),  # names of the arguments of the model's forward pass
) -> Iterator[Document]:
    """Yields the documents of `elements`; all elements must have the form of the first.

    Raises:
        CalibrationDataError: an element is not text, token ids or a dict of a known form, or the forms differ.
    """
    first_row, first_form = -1, ""
    column = ""
    for row, element in elements:
        form = _form(row, element)
        if not first_form:
            first_row, first_form = row, form
            if form == "a dict":
                _require_text_beside_media(row, element, accepts)
                column = _choose_column(row, element, text_column, string_columns)
        elif form != first_form:
            raise _mixed_forms(first_row, first_form, row, form)
        if form == "a text":
            yield Text(row, element)
        elif form == "a dict":
            yield from _documents_of_dict(row, element, column, accepts)
        else:
            yield from _token_rows(row, element)


# ---- the form of an element


def _form(row: int, element: Any) -> str:
    """Returns "a text", "a dict" or "token ids"; looks only at the type, so that it costs nothing."""
    if isinstance(element, str):
        return "a text"
    if isinstance(element, Mapping):
        return "a dict"
    if isinstance(element, list | tuple | Tensor | np.ndarray):
        return "token ids"
    remedy = f"expected a text, a list of token ids, or a dict with {_ROW_COLUMNS}"
    if isinstance(element, bytes | bytearray):
        remedy = "decode it to a string first"
    elif element is None:
        remedy = "remove it, or put a text or token ids in its place"
    elif isinstance(element, int | np.integer):
        remedy = "a single sequence of token ids must be wrapped in a list: dataset=[token_ids]"
    raise CalibrationDataError(f"Row {row} of the dataset is {type_name(element)}; {remedy}.")


def require_one_form(elements: Sequence[Any]) -> None:
    """Checks all elements in advance, because a list is visited in a random order and perhaps not to its end.

    Raises:
        CalibrationDataError: the forms differ, or one is unknown.
    """
    forms = [_form(row, element) for row, element in enumerate(elements)]
    for row, form in enumerate(forms):
        if form != forms[0]:
            raise _mixed_forms(0, forms[0], row, form)


def _mixed_forms(first_row: int, first_form: str, row: int, form: str) -> CalibrationDataError:
    return CalibrationDataError(
        f"Row {first_row} of the dataset is {first_form}, row {row} is {form}; all rows must have the same "
        "form. Split the data or convert one form into the other."
    )


# ---- dicts


def _choose_column(row: int, element: Mapping, text_column: str | None, string_columns: list[str] | None) -> str:
    """Returns the column to read in all rows: the named one, else token ids, messages, text or conversations."""
    if text_column is not None:
        if text_column not in element:
            raise CalibrationDataError(
                f"text_column is {text_column!r}, but row {row} of the dataset has the columns "
                f"{names_of(element)}. Set text_column to one of them."
            )
        return text_column
    for name in ("input_ids", "messages", "text"):
        if name in element:
            return name
    for name in COLUMNS:
        if is_conversation(element.get(name)):
            return name
    if string_columns is None:
        string_columns = [name for name, value in element.items() if isinstance(value, str)]
    if len(string_columns) != 1:
        raise CalibrationDataError(
            f"Row {row} of the dataset has the columns {names_of(element)}, of which {len(string_columns)} "
            f"hold strings; expected {_ROW_COLUMNS}. Set text_column."
        )
    return string_columns[0]


def _require_text_beside_media(row: int, element: Mapping, accepts: frozenset[str]) -> None:
    media = media_without_text(element, accepts)
    if media is not None:
        raise CalibrationDataError(
            f"Row {row} of the dataset has {media!r} but no 'input_ids'; expected what the model's processor returns "
            'for text and images together: processor(text=..., images=..., return_tensors="pt").'
        )


def _documents_of_dict(row: int, element: Mapping, column: str, accepts: frozenset[str]) -> Iterator[Document]:
    if column not in element:
        _require_text_beside_media(row, element, accepts)
        raise CalibrationDataError(
            f"Row {row} of the dataset has the columns {names_of(element)}, but the rows before it have "
            f"{column!r}; all rows need the same column."
        )
    value = element[column]
    if column == "input_ids":
        sample = sample_of(row, element, accepts)
        if sample is None:
            yield from _token_rows(row, value, element)
        else:
            yield sample
    elif column == "messages" or is_conversation(value):
        yield Chat(row, turns_of(row, column, value), element.get("images"))
    elif isinstance(value, str):
        yield Text(row, value)
    else:
        raise CalibrationDataError(
            f"Row {row}, column {column!r}, is {type_name(value)}; expected a string, or a list of turns. "
            "Filter such rows out, or set text_column to another column."
        )


def documents_of_encoding(row: int, encoding: Mapping, accepts: frozenset[str]) -> Iterator[Document]:
    """Yields the documents in a processor's output for a conversation."""
    return _documents_of_dict(row, encoding, "input_ids", accepts)


def _token_rows(row: int, value: Any, columns: Mapping | None = None) -> Iterator[TokenRow]:
    """Yields one TokenRow per sequence; `value` is (tokens,), or (batch, tokens) as data loaders return it."""
    columns = columns or {}
    token_ids = _integers(value, f"Row {row}", "token ids", kinds="iu")
    if token_ids.ndim not in (1, 2):
        raise CalibrationDataError(
            f"Row {row} of the dataset has the shape {tuple(token_ids.shape)}; expected a sequence of token "
            "ids, shape (tokens,)."
        )
    masks: dict[str, Tensor] = {}
    for name in ("attention_mask", "loss_mask", "labels"):
        if columns.get(name) is None:
            continue
        masks[name] = _integers(columns[name], f"Row {row}, column {name!r},", "integers", kinds="iub")
        if masks[name].shape != token_ids.shape:
            raise CalibrationDataError(
                f"Row {row}: {name} has the shape {tuple(masks[name].shape)}, input_ids "
                f"{tuple(token_ids.shape)}; expected one value per token. Correct {name} or remove that "
                "column."
            )
    token_ids = torch.atleast_2d(token_ids)
    is_token = torch.atleast_2d(masks.get("attention_mask", torch.ones_like(token_ids))) != 0
    counted = None
    if "loss_mask" in masks:  # takes precedence, because labels only imply what it states
        counted = torch.atleast_2d(masks["loss_mask"]) != 0
    elif "labels" in masks:
        counted = torch.atleast_2d(masks["labels"]) != IGNORED_LABEL
    for index, (ids, kept) in enumerate(zip(token_ids, is_token, strict=True)):
        kept_counted = None if counted is None else counted[index][kept]
        yield TokenRow(row, ids[kept], kept_counted, padding_tokens=int((~kept).sum()))


def _integers(value: Any, where: str, expected: str, kinds: str) -> Tensor:
    """Converts `value` to an int64 tensor of any shape on the CPU; `kinds` holds numpy's codes of the allowed types."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError) as error:  # ragged nesting, or a dtype that numpy lacks (bfloat16)
        raise CalibrationDataError(
            f"{where} could not be read as {expected} ({error}); expected a flat list or tensor of them."
        ) from error
    if array.size and array.dtype.kind not in kinds:
        remedy = "Remove everything that is not a token id; pass texts as strings"
        description = f"values of type {array.dtype}"
        if array.dtype.kind == "O":
            culprit = next((value for value in array.flat if not isinstance(value, int | np.integer)), array.flat[0])
            description = type_name(culprit)
            if isinstance(culprit, Mapping):
                remedy = "Wrap conversations: {'messages': [...]}"
        raise CalibrationDataError(f"{where} holds {description}; expected {expected}. {remedy}.")
    return torch.from_numpy(array.astype(np.int64))


def names_of(columns: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in columns) or "(none)"
