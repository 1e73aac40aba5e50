"""Reads conversations as lists of turns: with `role` and `content`, or as ShareGPT's files have them.

{"role": "user", "content": "Hello"}     unchanged, with whatever else the turn has
{"from": "human", "value": "Hello"}      the role that chat templates know, and the content
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CalibrationDataError
from ..messages import type_name

COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold conversations, most usual first."""

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""`from` in ShareGPT's files and those made after them -> `role` of chat templates."""


def is_conversation(value: Any) -> bool:
    """Returns whether `value` is a list of turns, judging by the first."""
    return isinstance(value, list | tuple | np.ndarray) and len(value) > 0 and isinstance(value[0], Mapping)


def turns_of(row: int, column: str, value: Any) -> list[dict[str, Any]]:
    """Returns the turns of a conversation, each with `role` and `content`.

    Raises:
        CalibrationDataError: it is not a list of turns, has none, or a speaker is unknown.
    """
    if not is_conversation(value) or not all(isinstance(turn, Mapping) and _has_speaker(turn) for turn in value):
        raise CalibrationDataError(
            f"Row {row}, column {column!r}, is {type_name(value)}; expected a non-empty list of dicts with 'role' and "
            "'content', or with 'from' and 'value'."
        )
    return [_turn(row, column, turn) for turn in value]


def _has_speaker(turn: Mapping[str, Any]) -> bool:
    return "role" in turn or ("from" in turn and "value" in turn)


def _turn(row: int, column: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in turn:
        return dict(turn)
    speaker = turn["from"]
    if speaker not in SPEAKERS:
        raise CalibrationDataError(
            f"Row {row}, column {column!r}: a turn is from {str(speaker)[:50]!r}; expected {', '.join(SPEAKERS)}. "
            "Rename that speaker, or pass turns with 'role' and 'content'."
        )
    others = {name: content for name, content in turn.items() if name not in ("from", "value")}
    return others | {"role": SPEAKERS[speaker], "content": turn["value"]}
