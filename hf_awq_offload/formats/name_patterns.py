"""Describes many module names by few patterns: names within a decoder differ only in numbers. Pure functions.

Checkpoints come with patterns of their own. Python's `re` takes exponential time for some and can't be stopped, so
those that may be slow go to the package `regex`, which can.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from functools import lru_cache

import regex

from ..errors import CheckpointError

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number, such as a layer's or an expert's."""

MATCH_SECONDS = 1.0

PREFIX = "re:"
"""Marks a regular expression in compressed-tensors, which matches it from the start of a name."""


def patterns_for(
    names: Collection[str],
    others: Collection[str],  # that must not be matched
) -> list[str]:
    """Sorted names and regular expressions (with the prefix) that match all `names` and none of `others`.

    Numbers become wildcards where that matches no other name: "model.layers.0.mlp.up_proj" and its counterparts in
    other layers become "re:model\\.layers\\.\\d+\\.mlp\\.up_proj$".
    """
    taken = {_wildcarded(name) for name in others}
    alone, shared = set(), set()
    for name in names:
        pattern = _wildcarded(name)
        if pattern in taken or not NUMBER.search(name):
            alone.add(name)
        else:
            shared.add(f"{PREFIX}{pattern}$")
    return sorted(alone) + sorted(shared)


def matches(
    pattern: str,  # a name, or a regular expression with the prefix
    name: str,
) -> bool:
    """Whether a pattern matches a module's name, by the rules of compressed-tensors."""
    if pattern.startswith(PREFIX):
        return found_at_start(pattern.removeprefix(PREFIX), name)
    return pattern == name


def found_at_start(expression: str, name: str) -> bool:
    """Whether a regular expression of a checkpoint matches a name from its start.

    Raises:
        CheckpointError: it takes more than MATCH_SECONDS to find out.
    """
    if is_quick(expression):
        return re.match(expression, name) is not None
    try:
        return regex.match(expression, name, timeout=MATCH_SECONDS) is not None
    except (TimeoutError, regex.error) as error:
        raise CheckpointError(
            f"The quantization_config has the pattern {expression[:200]!r}, which can't be compared with {name} "
            f"({error}). Correct config.json: write out the names of the modules."
        ) from error


@lru_cache(maxsize=4096)
def is_quick(expression: str) -> bool:
    """Whether `re` needs at most cubic time: three repetitions, none of which is repeated itself."""
    return len(re.findall(r"[*+{]", expression)) <= 3 and re.search(r"\)[*+{]", expression) is None


def fault_in(expression: str) -> str | None:
    """Returns why a text is not a valid regular expression, or None if it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of characters whose meaning may change
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def exact(name: str) -> str:
    """A pattern for one name. SGLang looks for an entry without the prefix anywhere in a name."""
    return f"{PREFIX}{re.escape(name)}$"


def pattern_of_choice(entry: str) -> str:
    """A pattern for what an entry of `modules_to_not_convert` stands for: a name or expression, and all below it."""
    if re.fullmatch(r"[\w.]+", entry):
        return rf"{PREFIX}(.*\.)?{re.escape(entry)}(\..*)?$"
    return rf"{PREFIX}(.*\.)?({entry})((?<=\.).*|\..*)?$"


def ancestors(name: str) -> list[str]:
    """Every module that a module or tensor is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _wildcarded(name: str) -> str:
    """A regular expression for `name` and all names that differ from it only in numbers."""
    parts = [r"\d+" if NUMBER.fullmatch(part) else re.escape(part) for part in name.split(".")]
    return r"\.".join(parts)
