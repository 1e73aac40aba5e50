"""docs/troubleshooting.md quotes messages that the source has, and no error class is left out."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import hf_awq_offload
from hf_awq_offload import errors

PACKAGE = Path(hf_awq_offload.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)


def texts_of(path: Path) -> list[str]:
    """Every text in a file's code, what is filled in written as …"""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_message_that_is_quoted_is_in_the_source():
    source = "\n".join(text for path in PACKAGE.rglob("*.py") for text in texts_of(path))
    assert len(QUOTES) > 30
    assert [quote for quote in QUOTES if quote not in source] == []


def test_every_error_class_has_its_section():
    classes = {
        name for name, value in inspect.getmembers(errors, inspect.isclass) if value is not errors.AwqOffloadError
    }
    assert set(re.findall(r"^## (\w+Error)$", PAGE, flags=re.MULTILINE)) == classes
