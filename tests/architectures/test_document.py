"""docs/architectures.md is up to date with what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

from document import render

HERE = Path(__file__).parent


def test_the_page_says_what_is_recorded():
    recorded = {
        name: json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in ("causal_lm", "image_text")
    }
    page = (HERE.parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page == render(**recorded), "run: python tests/architectures/record.py none"
