"""Reads the recipe file of `--config recipe.yaml`: YAML or JSON, with the fields of `AwqOffloadConfig` as keys."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from .outcome import UsageError
from .recipe_options import recipe_fields


def read_recipe_file(path: str) -> dict[str, Any]:
    """Returns the file's fields and values.

    Raises:
        UsageError: the file can't be read, is not valid YAML, or has a key that is not a field.
    """
    import yaml  # takes 0.05 s, which only this function needs

    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} can't be read: {error.strerror}. Name a YAML or JSON file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"--config {path} holds a {type(fields).__name__}; expected fields and values, like bits: 4.")
    known = list(recipe_fields())
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=3)
            hint = f"near misses: {', '.join(near)}" if near else f"known: {', '.join(known)}"
            raise UsageError(f"--config {path} has the key {key!r}, which is not a field of the recipe; {hint}.")
    return fields
