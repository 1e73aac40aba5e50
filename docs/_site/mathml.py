"""Turns formulas into MathML while the site is built: browsers show it without a script or a network.

Pages write $…$ and $$…$$, as GitHub shows them; pymdownx.arithmatex marks them up, this hook of mkdocs replaces them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.+?)\\\)|\\\[(.+?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with a page's HTML."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    inline, block = found.group(2), found.group(3)
    return convert(html.unescape((inline or block).strip()), display="inline" if inline else "block")
