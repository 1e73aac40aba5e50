"""Which grid a linear gets, and that mistakes are named before anything of the model is touched."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, token_batch
from transformers import AutoModelForCausalLM

from hf_awq_offload import AwqOffloadConfig, ConfigError, quantize_model
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.formats.grid_choice import (
    GridChoice,
    GridFields,
    check_that_all_match,
    checked_overrides,
    choice_for,
    choices,
)
from hf_awq_offload.formats.name_patterns import matches, patterns_for

BASE = GridFields(4, 128, True)
NAME = "model.layers.3.mlp.down_proj"


class TestChoice:
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            ({}, BASE),
            ({"up_proj": {"bits": 8}}, BASE),
            ({"down_proj$": {"bits": 8}}, GridChoice(8, 128, True)),
            ({"mlp": {"group_size": 32}}, GridChoice(4, 32, True)),
            ({r"layers\.3\.": {"zero_point": False}}, GridChoice(4, 128, False)),
            ({"down": {"bits": 8, "group_size": -1, "zero_point": False}}, GridChoice(8, -1, False)),
            ({"down": {"bits": 8}, "mlp": {"bits": 2}}, GridChoice(2, 128, True)),
            ({"mlp": {"bits": 2}, "down": {"bits": 8}}, GridChoice(8, 128, True)),
            ({"mlp": {"bits": 2, "group_size": 64}, "down": {"bits": 8}}, GridChoice(8, 64, True)),
            ({"^layers": {"bits": 2}}, BASE),
            ({"^model": {"bits": 2}}, GridChoice(2, 128, True)),
        ],
        ids=str,
    )
    def test_fields_are_changed_in_order_by_every_pattern_that_is_found(self, overrides, expected):
        assert choice_for(NAME, BASE, overrides) == expected
        assert choice_for(NAME, BASE, overrides) in choices(BASE, overrides)

    def test_the_recipe_resolves_the_group_size_and_the_dtype_of_scales(self):
        overrides = {"down_proj$": {"group_size": -1}}
        recipe = AwqOffloadConfig(overrides=overrides)
        assert recipe.grid(NAME, 96, torch.float32) == Grid(4, 96, True, torch.float16)
        assert recipe.grid(NAME, 96, torch.bfloat16) == Grid(4, 96, True, torch.bfloat16)
        assert AwqOffloadConfig().grid(NAME, 256, torch.bfloat16) == Grid(4, 128, True, torch.float16)

    def test_the_recipe_has_overrides_of_its_own(self):
        overrides = {"down_proj$": {"bits": 8}}
        recipe = AwqOffloadConfig(overrides=overrides)
        overrides["down_proj$"]["bits"] = 2
        recipe.to_dict()["overrides"]["down_proj$"]["bits"] = 3
        assert recipe.overrides == {"down_proj$": {"bits": 8}}
        assert AwqOffloadConfig.from_dict(recipe.to_dict()).overrides == recipe.overrides


class TestMistakes:
    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            ({"down_proj[": {"bits": 8}}, ["'down_proj['", "not a valid regular expression", "backslash"]),
            ({"*.down_proj": {"bits": 8}}, ["'*.down_proj'", "not a valid regular expression"]),
            ({"": {"bits": 8}}, ["the key ''"]),
            ({3: {"bits": 8}}, ["the key 3"]),
            ({"down": {}}, ["overrides['down'] is {}"]),
            ({"down": 8}, ["overrides['down'] is 8", "{'bits': 8}"]),
            ({"down": {"bit": 8}}, ["no field 'bit'", "did you mean 'bits'"]),
            ({"down": {"groupsize": 64}}, ["did you mean 'group_size'"]),
            ({"down": {"clip": True}}, ["no field 'clip'", "bits, group_size, zero_point"]),
            ({"down": {"bits": 5}}, ["overrides['down']: bits is 5", "2, 3 or 8"]),
            ({"down": {"bits": True}}, ["bits is True"]),
            ({"down": {"group_size": 48}}, ["group_size is 48"]),
            ({"down": {"zero_point": 1}}, ["zero_point is 1"]),
        ],
        ids=str,
    )
    def test_of_form_are_named_at_once(self, overrides, words):
        with pytest.raises(ConfigError) as caught:
            AwqOffloadConfig(overrides=overrides)
        assert all(word in str(caught.value) for word in words), caught.value

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("dwon_proj", "matches no linear's name.*such as model"),
            ("lm_head", "changes nothing.*lm_head .outside the decoder layers"),
            (r"layers\.0\..*up_proj", r"changes nothing.*layers\.0\.mlp\.up_proj .named in modules_to_not_convert"),
        ],
    )
    def test_a_pattern_that_changes_nothing_is_named_before_a_weight_is_touched(self, pattern, words, tmp_path):
        fields: dict[str, Any] = {"modules_to_not_convert": [r"model\.layers\.0"], "dataset": token_batch(4, 32)}
        recipe = AwqOffloadConfig(overrides={"k_proj": {"bits": 8}, pattern: {"bits": 8}}, group_size=32, **fields)
        model = tiny_llama()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ConfigError, match=f"overrides.{re.escape(repr(pattern))}. .*{words}"):
            quantize_model(model, recipe)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        model.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=words):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=recipe)

    def test_checking_names_against_none(self):
        words = r"'x'\] matches no linear's name\. Names are full ones; correct the pattern or leave it out\."
        with pytest.raises(ConfigError, match=words):
            check_that_all_match({"x": {"bits": 8}}, [], {})
        assert checked_overrides(None, BASE) == {}


NAMES = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "12", "mlp", "up_proj", "up.proj", "a[0]", "h2"]),
    min_size=1,
    max_size=5,
).map(".".join)


@given(names=st.sets(NAMES, min_size=1), others=st.sets(NAMES))
def test_patterns_match_exactly_the_names(names, others):
    patterns = patterns_for(names, others - names)
    for name in names | others:
        assert any(matches(pattern, name) for pattern in patterns) == (name in names)


def test_a_decoder_needs_few_patterns():
    names = {f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(30) for e in range(60)}
    assert patterns_for(names, {"model.layers.0.mlp.up_proj"}) == [
        r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$"
    ]
    some = {name for name in names if ".layers.3." in name}
    assert patterns_for(some, names - some) == sorted(some)
