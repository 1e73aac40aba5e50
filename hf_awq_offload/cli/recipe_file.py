"""The recipe in a file: `--config recipe.yaml`, YAML or JSON, fields of `AwqOffloadConfig` by their names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from .outcome import UsageError
from .recipe_options import recipe_fields


def read_recipe_file(path: str) -> dict[str, Any]:
    """Field -> value.

    Raises:
        UsageError: the file is not there, is no YAML, or has a key that is no field.
    """
    import yaml  # 0.05 s, and only here

    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} can't be read: {error.strerror}. Name a YAML or JSON file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is no YAML: {' '.join(str(error).split())}.") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"--config {path} holds a {type(fields).__name__}; expected fields and values, as in bits: 4.")
    known = list(recipe_fields())
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=3)
            hint = f"near misses: {', '.join(near)}" if near else f"known: {', '.join(known)}"
            raise UsageError(f"--config {path} has the key {key!r}, which is no field of the recipe; {hint}.")
    return fields
