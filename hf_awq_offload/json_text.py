"""Parses JSON that others have written: config files, indexes, headers, data.

Python's parser recurses once per bracket, accepts a key twice and has limits of its own; each raises another error, or
none. Here every fault is a ValueError. Imports no torch: the command line parses options with it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

MAX_DEPTH = 64
"""Brackets within brackets. Files of checkpoints have about six; functions that recurse get on with this many."""


def parse_json(text: str | bytes, strict: bool = False, unique_keys: bool = False) -> Any:
    """Returns the value of a JSON text, UTF-8 if it is bytes.

    Args:
        text: the text.
        strict: refuse what is not valid JSON but Python accepts: NaN and Infinity, which config files of transformers
            have, and halves of a UTF-16 pair. Keys have to be unique, too.
        unique_keys: refuse an object that has a key twice. Otherwise the last one counts, as for all readers in Python.

    Raises:
        json.JSONDecodeError (a ValueError): it is not valid JSON.
        ValueError: it is no UTF-8, a key is there twice that may not be, an integer has thousands of digits, or
            brackets are nested more than MAX_DEPTH deep.
    """
    hook = _without_doubles if strict or unique_keys else None
    if isinstance(text, bytes | bytearray):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=hook, parse_constant=_refuse_constant if strict else float)
    except RecursionError:
        raise _too_deep() from None
    _require_shallow(value)
    if strict and "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object; of two entries with one key, readers take the first or the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice[:80]!r} twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"brackets are nested more than {MAX_DEPTH} deep")
