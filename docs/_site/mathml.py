"""Converts formulas to MathML when the site is built: browsers show MathML without a script or a network.

Pages write $…$ and $$…$$, which GitHub renders too; pymdownx.arithmatex marks them up, and this mkdocs hook converts
them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.+?)\\\)|\\\[(.+?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs calls this with the HTML of each page."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    inline, block = found.group(2), found.group(3)
    return convert(html.unescape((inline or block).strip()), display="inline" if inline else "block")
