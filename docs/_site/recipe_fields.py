"""Describes the recipe's fields on the reference page: mkdocstrings reads the source, which has no such docstring.

mkdocs.yml loads this extension of griffe. It imports the table of fields alone, which needs no torch.
"""

from __future__ import annotations

from typing import Any

import griffe

from hf_awq_offload.recipe_fields import with_fields_described


class DescribeRecipeFields(griffe.Extension):
    """Gives AwqOffloadConfig the docstring that config.py gives it at import."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called by griffe with every class that it has read."""
        if cls.path == "hf_awq_offload.config.AwqOffloadConfig":
            assert cls.docstring is not None
            cls.docstring.value = with_fields_described(cls.docstring.value)
