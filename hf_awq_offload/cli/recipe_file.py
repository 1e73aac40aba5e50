"""Reads the recipe file of `--config recipe.yaml`: YAML or JSON, with the fields of `AwqOffloadConfig` as keys.

Nothing but plain values is made from it: PyYAML's safe loader knows no Python objects. What it lets through is refused
here: a key twice, and aliases that unfold a few lines to billions of entries.
"""

from __future__ import annotations

import difflib
from itertools import islice
from typing import Any

from .outcome import UsageError
from .recipe_options import recipe_fields

MAX_BYTES = 1_000_000
MAX_ENTRIES = 100_000
"""Entries in all lists and dicts, those behind an alias counted each time."""


def read_recipe_file(path: str) -> dict[str, Any]:
    """Returns the file's fields and values.

    Raises:
        UsageError: the file can't be read, is too large, is not valid YAML, or has a key that is not a field.
    """
    fields = _parsed(path)
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"--config {path} holds a {type(fields).__name__}; expected fields and values, like bits: 4.")
    _require_few_entries(path, fields)
    known = list(recipe_fields())
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:100].replace("-", "_"), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
            raise UsageError(
                f"--config {path} has the key {repr(key)[:100]}, which is not a field of the recipe; {hint}"
            )
    return fields


def _parsed(path: str) -> Any:
    import yaml  # takes 0.05 s, which only this function needs

    class Loader(yaml.SafeLoader):
        """Refuses a key that an object has twice; the base class takes the last one."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            mapping = super().construct_mapping(node, deep)
            if len({self.construct_object(key, deep=True) for key in own}) < len(own):
                raise yaml.constructor.ConstructorError(None, None, "an object has a key twice", node.start_mark)
            return mapping

    try:
        with open(path, "rb") as opened:  # perhaps a pipe
            content = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--config {path} can't be read: {reason}. Name a YAML or JSON file.") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"--config {path} is longer than {MAX_BYTES} bytes; expected a recipe, of a few lines.")
    try:
        return yaml.load(content.decode("utf-8"), Loader)
    except Exception as error:  # of many kinds: PyYAML's constructors for dates and numbers check little
        said = " ".join(str(error).split())[:500] or type(error).__name__
        raise UsageError(f"--config {path} is not valid YAML: {said}.") from error


def _require_few_entries(path: str, value: Any) -> None:
    left, level = MAX_ENTRIES, [value]
    while level:
        left -= len(level)
        if left < 0:
            raise UsageError(
                f"--config {path} unfolds to more than {MAX_ENTRIES} entries; write them out without anchors and "
                "aliases."
            )
        inner = (
            entry
            for outer in level
            if isinstance(outer, dict | list | tuple | set)
            for entry in (outer.values() if isinstance(outer, dict) else outer)
        )
        level = list(islice(inner, MAX_ENTRIES + 1))
