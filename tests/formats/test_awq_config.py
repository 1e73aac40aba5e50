"""The quantization_config of AWQ checkpoints: what is read, what is refused, what other tools read in it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers.utils.quantization_config import AwqConfig

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.awq_config import AwqCheckpointConfig
from hf_awq_offload.formats.grid_choice import GridChoice


def parsed(**changes) -> SimpleNamespace:
    """What transformers parses config.json to."""
    fields = {"bits": 4, "group_size": 64, "zero_point": True, "format": "gemm", "modules_to_not_convert": None}
    return SimpleNamespace(**{**fields, "meta": None, **changes})


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast", "llm-awq"])
@pytest.mark.parametrize("group_size", [-1, 1, 32, 128])
def test_every_field_is_taken_over(version, group_size):
    config = AwqCheckpointConfig.from_awq_config(
        parsed(
            format=version, group_size=group_size, zero_point=False, modules_to_not_convert=["lm_head"], meta={"a": 1}
        )
    )
    assert config.layout == version
    assert config.choice == GridChoice(4, group_size, False)
    assert config.modules_to_not_convert == ["lm_head"]
    assert config.meta == {"a": 1}


@pytest.mark.parametrize("group_size", [0, -2, -128, True, "128", 64.0, None])
def test_a_group_size_that_is_none_is_refused(group_size):
    with pytest.raises(CheckpointError, match=f"group_size={group_size!r}; expected a positive number .* or -1"):
        AwqCheckpointConfig.from_awq_config(parsed(group_size=group_size))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, "says bits=3; the AWQ format stores 4"),
        ({"format": "marlin"}, "version is 'marlin'; supported: gemm, gemv, gemv_fast, llm-awq"),
    ],
)
def test_what_no_reader_here_has_is_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        AwqCheckpointConfig.from_awq_config(parsed(**changes))


def test_the_standard_reads_back_what_is_written():
    written = AwqCheckpointConfig(group_size=32, zero_point=False, modules_to_not_convert=["lm_head"], meta={"a": [1]})
    fields = json.loads(json.dumps(written.to_dict()))
    assert fields == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": False,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "desc_act": False,
        "lm_head": False,
        "meta": {"a": [1]},
    }
    again = AwqCheckpointConfig.from_awq_config(AwqConfig.from_dict(dict(fields)))
    assert (again.choice, again.layout, again.modules_to_not_convert) == (written.choice, "gemm", ["lm_head"])


def test_what_is_written_is_a_copy():
    config = AwqCheckpointConfig(modules_to_not_convert=["lm_head"], meta={"a": [1]})
    fields = config.to_dict()
    fields["modules_to_not_convert"].append("x")
    fields["meta"]["a"].append(2)
    assert (config.modules_to_not_convert, config.meta) == (["lm_head"], {"a": [1]})


def test_linears_that_become_dense_are_listed_once_and_behind_those_that_were():
    config = AwqCheckpointConfig(modules_to_not_convert=["lm_head"])
    config.leave_out(["b", "lm_head", "a"])
    assert config.modules_to_not_convert == ["lm_head", "b", "a"]
    config.leave_out(["a"])
    assert config.modules_to_not_convert == ["lm_head", "b", "a"]


def test_without_any_the_list_stays_empty():
    config = AwqCheckpointConfig()
    config.leave_out([])
    assert config.modules_to_not_convert is None
    config.leave_out(["a"])
    assert config.modules_to_not_convert == ["a"]
