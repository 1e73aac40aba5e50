"""What a mistyped name of a module may have meant."""

from __future__ import annotations

import pytest

from hf_awq_offload.formats.nearest_names import MOST_NAMED, nearest_names

NAMES = [
    *(f"model.layers.{i}.self_attn.{part}_proj" for i in range(12) for part in "qkvo"),
    *(f"model.layers.{i}.mlp.{part}_proj" for i in range(12) for part in ("gate", "up", "down")),
    "lm_head",
]


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("dwon_proj", "down_proj"),
        ("dwon_proj$", "down_proj"),
        ("lm_haed", "lm_head"),
        (r"mpl\.gate_proj$", "mlp.gate_proj"),
        (r"self_atn\.q_proj", "self_attn.q_proj"),
        (r"^modle\.layers", "model.layers"),
        ("model.layers.3.mlp.upproj", "model.layers.3.mlp.up_proj"),
        (".*down_prj", "down_proj"),
    ],
)
def test_the_nearest_comes_first_and_has_as_many_parts(entry, meant):
    found = nearest_names(entry, NAMES)
    assert found[0] == meant
    assert len(found) <= MOST_NAMED
    assert {name.count(".") for name in found} == {meant.count(".")}


def test_one_is_named_even_if_none_is_near():
    assert len(nearest_names("zzzz", NAMES)) == 1
    assert nearest_names("zzzz", []) == []


def test_a_name_that_ends_in_a_number_is_no_proposal():
    assert not any(name[-1].isdigit() for name in nearest_names("model.layers.99", NAMES))
