"""Few patterns for many module names: the names of a decoder differ in numbers only. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number: a layer's, or an expert's."""

PREFIX = "re:"
"""What compressed-tensors has before a regular expression; it is matched from the start of a name."""


def patterns_for(
    names: Collection[str],
    others: Collection[str],  # that must not be matched
) -> list[str]:
    """Names, and regular expressions with the prefix, that match `names` and none of `others`; sorted.

    Numbers become wildcards where that matches no other name: "model.layers.0.mlp.up_proj" and its like in all layers
    are "re:model\\.layers\\.\\d+\\.mlp\\.up_proj$".
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
    """As compressed-tensors matches module names."""
    if pattern.startswith(PREFIX):
        return re.match(pattern.removeprefix(PREFIX), name) is not None
    return pattern == name


def _wildcarded(name: str) -> str:
    """A regular expression for names that differ from `name` in their numbers only."""
    parts = [r"\d+" if NUMBER.fullmatch(part) else re.escape(part) for part in name.split(".")]
    return r"\.".join(parts)
