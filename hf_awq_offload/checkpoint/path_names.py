"""Checks names of files and folders before a run: libraries in Rust open none that is not UTF-8."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError


def require_utf8(paths: Mapping[str, Any]) -> None:
    """Checks what may be a path, by the name of its argument; what is no path is not looked at.

    In the C locale, with UTF-8 mode off, Python decodes the bytes of a name like "modèle" to lone surrogates. Then
    tokenizers and safetensors fail on it, each in its own words.

    Raises:
        ConfigError: a path can't be encoded in UTF-8.
    """
    for argument, path in paths.items():
        if not isinstance(path, str | os.PathLike):
            continue
        try:
            os.fsdecode(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{argument} is {os.fsdecode(path)!a}, whose letters can't be told in this locale (the encoding of "
                f"names is {sys.getfilesystemencoding()}); expected UTF-8. Set PYTHONUTF8=1, or LC_ALL=C.UTF-8, or "
                "rename the folder."
            ) from error
