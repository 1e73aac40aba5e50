"""Loads the tokenizer and processor for calibration data, and renders conversations with images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from ..errors import CalibrationDataError
from ..messages import type_name
from .documents import Chat

TEXT_BLOCK_CHARACTERS = 1 << 20
"""Longer documents are tokenized in blocks of this size, so that reading can stop in the middle of a book."""


def tokenizer_of(
    given: Any, load_own: Callable[[], PreTrainedTokenizerBase], arguments: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """Returns `given` or its tokenizer, the tokenizer of that name or path, or the checkpoint's own for None.

    Args:
        given: what the user has passed as `tokenizer`.
        load_own: loads the checkpoint's own.
        arguments: for loading the one of that name (token, cache_dir, …).

    Raises:
        CalibrationDataError: there is none, or it could not be loaded.
    """
    if isinstance(given, ProcessorMixin):
        return cast(Any, given).tokenizer
    if given is not None and not isinstance(given, str | os.PathLike):
        return given
    which = "The checkpoint's own tokenizer" if given is None else f"The tokenizer {os.fspath(given)!r}"
    remedy = "Set `tokenizer` to a tokenizer, its name or path, or pass token ids as `dataset`."
    _require_there(given, remedy)
    try:
        tokenizer = load_own() if given is None else AutoTokenizer.from_pretrained(given, **(arguments or {}))
    except Exception as error:  # of any kind: files, network, remote code
        raise CalibrationDataError(
            f"The calibration data is text, but its tokenizer is missing. {which} could not be loaded "
            f"({type(error).__name__}: {error}). {remedy}"
        ) from error
    if tokenizer is None:
        raise CalibrationDataError(f"The calibration data is text, but there is no tokenizer. {remedy}")
    return tokenizer


def _require_there(given: str | os.PathLike[str] | None, remedy: str) -> None:
    """Refuses a path with nothing there, which transformers takes for a name on the hub.

    Raises:
        CalibrationDataError: `given` looks like a path, and there is nothing.
    """
    path = "" if given is None else os.fspath(given)
    if path.startswith((".", "/", "~")) and not os.path.exists(path):
        raise CalibrationDataError(f"The tokenizer {path!r} looks like a path, but nothing is there. {remedy}")


def processor_of(
    given: Any, load_own: Callable[[], ProcessorMixin] | None, arguments: Mapping[str, Any] | None = None
) -> ProcessorMixin:
    """Returns `given`, the processor of that name or path, or the checkpoint's own for None; see `tokenizer_of`.

    Raises:
        CalibrationDataError: there is none, or it could not be loaded.
    """
    if isinstance(given, ProcessorMixin):
        return given
    remedy = "Set `tokenizer` to the model's processor, or pass what it returns as rows of `dataset`."
    try:
        if given is not None and not isinstance(given, str | os.PathLike):
            raise TypeError(f"`tokenizer` is a {type(given).__name__}, which takes text only")
        if given is None and load_own is None:
            raise TypeError("the model has none")
        _require_there(given, remedy)
        if given is None and load_own is not None:
            processor = load_own()
        else:
            processor = AutoProcessor.from_pretrained(given, **(arguments or {}))
    except Exception as error:  # of any kind: files, network, remote code, missing packages
        raise CalibrationDataError(
            f"The calibration data holds images, but their processor could not be loaded ({type(error).__name__}: "
            f"{error}). {remedy}"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise CalibrationDataError(
            f"The calibration data holds images, but the model's processor is a {type(processor).__name__}, which "
            f"takes text only. {remedy}"
        )
    return processor


def render_with_media(chat: Chat, processor: ProcessorMixin) -> Mapping[str, Any]:
    """Renders a conversation with images with the processor's chat template.

    Raises:
        CalibrationDataError: the processor failed.
    """
    try:
        if chat.images is None:
            return cast(Any, processor).apply_chat_template(
                chat.messages, tokenize=True, return_dict=True, return_tensors="pt"
            )
        text = cast(Any, processor).apply_chat_template(chat.messages, tokenize=False)
        return processor(text=[text], images=chat.images, return_tensors="pt")
    except Exception as error:  # of any kind: templates and image readers can raise anything
        raise CalibrationDataError(
            f"The processor (a {type(processor).__name__}) could not render row {chat.row}, column 'messages' "
            f"({type(error).__name__}: {error}). Pass the processor of a chat model, or what it returns as rows."
        ) from error


def list_of_ids(value: Any) -> list[int]:
    """Returns what a tokenizer gave for one text as a list.

    Raises:
        TypeError: it is not a sequence of integers.
    """
    ids = value.tolist() if isinstance(value, Tensor | np.ndarray) else list(value)
    wrong = next((item for item in ids if isinstance(item, bool) or not isinstance(item, int | np.integer)), None)
    if wrong is not None:
        raise TypeError(f"input_ids holds {type_name(wrong)}, where token ids are expected")
    return ids


def text_blocks(text: str) -> Iterator[str]:
    """Yields blocks of at most TEXT_BLOCK_CHARACTERS, cut after the end of a line if there is one."""
    start = 0
    while len(text) - start > TEXT_BLOCK_CHARACTERS:
        end = text.rfind("\n", start, start + TEXT_BLOCK_CHARACTERS) + 1 or start + TEXT_BLOCK_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
