"""Patterns in a checkpoint's config can't keep a load busy for ever, and mean what transformers takes them for."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_awq_offload import AwqOffloadConfig, CheckpointError, ConfigError
from hf_awq_offload.formats import name_patterns
from hf_awq_offload.formats.awq_config import AwqCheckpointConfig
from hf_awq_offload.formats.compressed_tensors_config import PackedCheckpointConfig
from hf_awq_offload.formats.grid_choice import GridChoice
from hf_awq_offload.formats.name_patterns import found_at_start, matches
from hf_awq_offload.integrations.loading import choice_in

NAME = "model.language_model.layers.10.mlp.experts.103.down_proj"
SLOW = [r"((a|\w)+\.?)+!", r"(.|\w)*(?<=z)", r"(?:.*?.*?.*?.*?.*?.*?.*?.*?)\bq(?!.)x"]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(name_patterns, "MATCH_SECONDS", 0.2)


def ask(kind: str, pattern: str) -> None:
    linear = nn.Linear(1, 1, device="meta")
    if kind == "awq":
        choice_in(AwqCheckpointConfig(), NAME * 4, NAME, linear, [pattern])
    else:
        config = PackedCheckpointConfig(grids={"Linear": GridChoice(4, 32, True)}, ignore=[f"re:{pattern}"])
        config.choice_for([NAME * 4], linear)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("kind", ["compressed-tensors", "awq"])
def test_a_pattern_for_which_re_takes_for_ever_is_answered_or_stopped(kind, pattern):
    start = time.process_time()
    with suppress(CheckpointError):
        ask(kind, pattern)
    assert time.process_time() - start < 20


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", ["compressed-tensors", "awq"])
def test_a_pattern_that_is_stopped_is_named(kind):
    with pytest.raises(CheckpointError, match=r"can't be compared with .* \(regex timed out\)\. Correct config\.json"):
        ask(kind, SLOW[1])


PATTERNS = [
    *(
        "lm_head",
        "model",
        r".*\.mlp\..*",
        r"model\.layers\.\d+\.mlp",
        "(q|k)_proj",
        r"(.*\.)?(down_proj)((?<=\.).*|\..*)?$",
    ),
    *(
        r"(?:\w+\.)+down_proj$",
        r"(model|visual)(\.\w+){2,9}",
        r"[a-z_.0-9]+\.experts\.\d+\.\w+",
        "experts.103.down_proj",
    ),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_engines_agree(pattern, monkeypatch):
    names = [NAME, "lm_head", "model.layers.1.mlp.gate", "visual.blocks.0.qkv", "layers.10.self_attn.q_proj"]
    linear, config = nn.Linear(1, 1, device="meta"), AwqCheckpointConfig()
    usual = [(found_at_start(pattern, name), matches(f"re:{pattern}", name)) for name in names]
    kept = [choice_in(config, name, name, linear, [pattern]) is None for name in names]
    assert kept == [not should_convert_module(name, [pattern]) for name in names]
    monkeypatch.setattr(name_patterns, "is_quick", lambda expression: False)
    monkeypatch.setattr("hf_awq_offload.integrations.loading.is_quick", lambda expression: False)
    assert [(found_at_start(pattern, name), matches(f"re:{pattern}", name)) for name in names] == usual
    assert [choice_in(config, name, name, linear, [pattern]) is None for name in names] == kept


@pytest.mark.parametrize(
    "pattern", ["a{99999999999999999999}", "(" * 3000 + ")" * 3000, "("], ids=["many", "deep", "open"]
)
def test_a_recipe_with_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        AwqOffloadConfig(overrides={pattern: {"bits": 8}})
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        AwqOffloadConfig(modules_to_not_convert=[pattern])
