"""Keeps the names of command-line options on one line when the site is built: browsers break text at hyphens."""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"(?<!<pre>)(<code[^>]*>)([^<]*)(</code>)")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs calls this with the HTML of each page."""
    return CODE.sub(lambda found: found[1] + OPTION.sub(_unbroken, found[2]) + found[3], content)


def _unbroken(option: re.Match[str]) -> str:
    return f'<span style="white-space: nowrap">{option[0]}</span>'
