"""Finds the names of modules that a mistyped one may have meant. Pure functions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMED = 3


def nearest_names(
    entry: str,  # a name, the start or end of one, or a regular expression for it
    names: Iterable[str],  # full names of modules
) -> list[str]:
    """Returns the starts and ends of names, of as many parts, that are most like the entry; one at least."""
    wanted = entry.replace("\\", "").strip("^$*.")
    count = wanted.count(".") + 1
    parts = [name.split(".") for name in names]
    candidates = dict.fromkeys(
        ".".join(part) for split in parts for part in (split[-count:], split[:count]) if not part[-1].isdigit()
    )
    near = difflib.get_close_matches(wanted, candidates, n=MOST_NAMED)
    return near or difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.0)
