"""Wherever a disk fills up or becomes read-only, nothing is lost and a repeat ends with the same bytes.

These tests make some of an operation's calls to the system fail; `tests/bench/faults.py` makes each of them fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from injection import build, swept


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "fault", "every", "first"),
    [
        ("quantize", "full", 37, 9),
        ("quantize", "read-only", 41, 20),
        ("requantize", "forbidden", 47, 5),
        ("convert", "full for a moment", 19, 5),
        ("convert", "read-only", 23, 3),
        ("save", "full", 6, 2),
    ],
)
def test_a_failing_call_loses_nothing(operation, fault, every, first, library, tmp_path):
    count, *attempts = swept(library, tmp_path, operation, fault, every, first)
    assert count["calls"] > 20
    assert len(attempts) >= 3
    assert [attempt for attempt in attempts if attempt["wrong"]] == []
    assert sum(bool(attempt["said"]) for attempt in attempts) >= 2, "the calls did fail"
