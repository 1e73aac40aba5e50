"""A short run of the fuzzer: nothing but errors of the package comes out of what reads others' files."""

from __future__ import annotations

import pytest
from fuzz import Result, fuzz
from fuzz_targets import TARGETS
from mutations import HOSTILE, changed_bytes, changed_value

LEAST, IN_ALL = 60, 2000


@pytest.mark.filterwarnings("ignore")  # of what YAML, regular expressions and pandas think of such input
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_read_only_errors_of_the_package_come_out(name):
    executions = max(LEAST, IN_ALL * TARGETS[name][1] // 1000)
    result = fuzz(name, executions, seed=1)
    assert not result.failures, "\n".join(text for _, text in result.failures.values())
    assert result.executions == executions


def test_the_fuzzer_finds_what_it_looks_for(monkeypatch):
    def careless(random, folder):
        changed_value({"a": [1, 2]}, random)["a"][1].real  # noqa: B018

    monkeypatch.setitem(TARGETS, "careless", (careless, 1))
    result: Result = fuzz("careless", 200, seed=0)
    assert {kind.partition(" ")[0] for kind in result.failures} >= {"TypeError", "KeyError", "IndexError"}
    number = min(number for number, _ in result.failures.values())
    assert fuzz("careless", 1, seed=0, first=number).failures, "an input can be made again"


def test_inputs_depend_on_the_seed_alone():
    from random import Random

    value = {"a": [1, {"b": "c"}], "d": None}
    for seed in range(20):
        assert repr(changed_value(value, Random(seed))) == repr(changed_value(value, Random(seed)))
        assert changed_bytes(b"abc" * 9, Random(seed)) == changed_bytes(b"abc" * 9, Random(seed))
    assert value == {"a": [1, {"b": "c"}], "d": None}, "the sound input is left alone"
    assert any(changed_value(value, Random(seed)) != value for seed in range(3))
    assert HOSTILE
