"""Compares what two runs are, by the headers of their journals: which fields differ, and how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..messages import shortened

RELEASE = ("format", "package")
"""Parts that say which release made a journal; other parts of two releases can't be compared."""
MOST_NAMED = 6
LONGEST_VALUE = 80


def differences(
    there: Mapping[str, Any],  # in the journal
    here: Mapping[str, Any],  # of this run
) -> str:
    """Returns the fields that differ with both values, such as "recipe.clip (true in the journal, false now)".

    It is empty if none does. Both are part -> JSON value.
    """
    before, now = (dict(_fields(json.loads(json.dumps(header, default=str)))) for header in (there, here))
    changed = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    changed = [name for name in changed if name in RELEASE] or changed
    shown = [f"{name} ({_shown(before, name)} in the journal, {_shown(now, name)} now)" for name in changed]
    return shortened(shown, MOST_NAMED)


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of nested objects by their dotted names."""
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, inner in value.items():
        yield from _fields(inner, f"{name}.{key}".lstrip("."))


def _shown(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        return "none"
    text = json.dumps(fields[name], ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
