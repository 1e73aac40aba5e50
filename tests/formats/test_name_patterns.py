"""Patterns against what they stand for, name by name."""

from __future__ import annotations

import pytest

from hf_awq_offload.formats.name_patterns import ancestors, exact, matches, pattern_of_choice


@pytest.mark.parametrize(
    ("entry", "found", "not_found"),
    [
        (
            "mlp",
            ["mlp", "model.layers.0.mlp", "model.layers.0.mlp.up_proj", "mlp.up_proj"],
            ["model.mlps", "model.xmlp", "model.mlp_2.up_proj", "up_proj"],
        ),
        (
            "layers.1",
            ["model.layers.1", "layers.1.mlp.up_proj"],
            ["model.layers.10", "model.layers.11.mlp", "layersx1"],
        ),
        (
            r"layers\.[01]\.",
            ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn", "layers.0.x"],
            ["model.layers.10.mlp.up_proj", "model.layers.2.x"],
        ),
        ("gate|up_proj", ["a.gate", "a.up_proj", "gate.weight"], ["a.gate_proj", "a.gate_up_proj", "gates"]),
        (r"layers\.\d+\.mlp", ["model.layers.12.mlp", "layers.1.mlp.gate"], ["model.layers.12.mlpx", "layers.x.mlp"]),
    ],
)
def test_an_entry_of_the_recipe_stands_for_a_module_and_all_below_it(entry, found, not_found):
    pattern = pattern_of_choice(entry)
    assert [name for name in found + not_found if matches(pattern, name)] == found


def test_an_exact_pattern_matches_one_name():
    assert matches(exact("a.b[0].c"), "a.b[0].c")
    assert not any(matches(exact("a.b"), name) for name in ("a.b.c", "axb", "x.a.b", "a.bc"))


def test_without_the_prefix_a_pattern_is_a_name():
    assert matches("a.b", "a.b")
    assert not any(matches("a.b", name) for name in ("axb", "a.b.c", "a"))
    assert matches("re:a.b", "axbc")
    assert not matches("re:a.b", "xaxb")


def test_ancestors_are_all_modules_around_one():
    assert ancestors("a.b.c") == ["a", "a.b"]
    assert ancestors("a") == []
