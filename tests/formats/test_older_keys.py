"""The keys of transformers 4 beside those of transformers 5, for every kind of model that transformers knows."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from references.readers_of_config import model_dtype, rotary_embedding
from transformers import (
    CONFIG_MAPPING,
    Gemma3TextConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from hf_awq_offload.checkpoint.config_file import add_older_keys, completed
from hf_awq_offload.formats.older_keys import with_older_keys

ADDED = {"torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct",
         "rotary_emb_base", "global_rope_theta", "local_rope_theta"}  # fmt: skip


@pytest.fixture
def quiet() -> Iterator[None]:
    """Default configs of some types make transformers warn."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(verbosity)


def new_keys(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What `after` has and `before` has not, by dotted path; everything else has to be equal."""
    found = {}
    for key, value in after.items():
        if key not in before:
            found[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            found |= {f"{key}.{name}": added for name, added in new_keys(before[key], value).items()}
        else:
            assert value == before[key], key
    assert before.keys() <= after.keys()
    return found


def read(config_class: type[PreTrainedConfig], fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(fields))
    return config_class.from_pretrained(folder).to_dict()


def written(config: PreTrainedConfig) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    return json.loads(config.to_json_string())


def default_config(model_type: str) -> PreTrainedConfig | None:
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:  # needs arguments, or a package that is not installed
        return None


def test_every_type_is_read_as_before(tmp_path, quiet):
    """With the old keys, transformers 5 makes the same config of the file as without them."""
    seen, with_base = 0, 0
    for model_type in CONFIG_MAPPING:
        config = default_config(model_type)
        if config is None or '"rope_parameters"' not in config.to_json_string(use_diff=False):
            continue
        config.dtype = "bfloat16"
        fields = written(config)
        after = completed(fields)
        added = new_keys(fields, after)
        assert {path.rpartition(".")[2] for path in added} <= ADDED, model_type
        assert model_dtype(after) == "bfloat16", model_type
        assert read(type(config), after, tmp_path) == read(type(config), fields, tmp_path), model_type
        with_base += any("theta" in path or "base" in path for path in added)
        seen += 1
    assert seen > 300
    assert with_base > 0.9 * seen


OLD: list[tuple[type[PreTrainedConfig], dict[str, Any]]] = [
    (LlamaConfig, {"rope_theta": 500000.0}),
    (LlamaConfig, {"rope_theta": 10000.0}),  # the default, which transformers 5 may leave away
    (LlamaConfig, {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    (Qwen3MoeConfig, {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                          "original_max_position_embeddings": 4096}}),
    (Qwen2_5_VLConfig, {"text_config": {"model_type": "qwen2_5_vl_text", "rope_theta": 1e6,
                                        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}}),
    (GlmConfig, {"rope_theta": 20000.0, "partial_rotary_factor": 0.25}),
    (GPTNeoXConfig, {"rotary_emb_base": 40000, "rotary_pct": 0.5}),
    (GPTNeoXConfig, {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    (Gemma3TextConfig, {"rope_theta": 2e6, "rope_local_base_freq": 5000.0}),
    (Gemma3TextConfig, {"rope_theta": 1e6, "rope_local_base_freq": 10000.0,
                        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    (ModernBertConfig, {"global_rope_theta": 80000.0, "local_rope_theta": 5000.0}),
    (Olmo3Config, {"rope_theta": 500000.0}),
    (Phi3Config, {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
                  "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}}),
]  # fmt: skip
"""What config.json says in checkpoints that transformers 4 has written."""


@pytest.mark.parametrize(("config_class", "old"), OLD, ids=[f"{c.model_type}-{i}" for i, (c, _) in enumerate(OLD)])
def test_a_source_in_the_old_form_gets_its_values_back(config_class, old, quiet):
    config = config_class.from_dict(copy.deepcopy({**old, "torch_dtype": "bfloat16"}))
    result = completed(written(config), config_class)
    assert result["torch_dtype"] == "bfloat16"
    for name, value in old.items():
        if isinstance(value, dict) and name.endswith("config"):
            assert {key: result[name][key] for key in value} == value
        else:
            assert result[name] == value
    assert ("rope_scaling" in result) == ("rope_scaling" in old)


def test_every_layer_type_alike_has_one_base():
    rope = {name: {"rope_type": "default", "rope_theta": 7.0} for name in ("full_attention", "sliding_attention")}
    config = Olmo3Config(rope_parameters=rope)
    assert rotary_embedding(completed(written(config))) == (7.0, {"rope_type": "default"})


def test_bases_that_had_no_old_names_are_not_written(quiet):
    """Gemma 4 is no model of transformers 4: a base for its global layers would be read as that of all."""
    config = CONFIG_MAPPING["gemma4_text"]()
    added = new_keys(written(config), completed(written(config)))
    assert not {name for name in added if "rope" in name or "rotary" in name}


def test_no_key_that_is_there_changes():
    fields = written(LlamaConfig(rope_theta=500000.0, dtype="bfloat16"))
    fields |= {"rope_theta": 3.0, "torch_dtype": "float16"}
    assert completed(fields) == fields
    assert completed(completed(fields)) == completed(fields)


def test_what_is_no_dtype_of_a_part_stays_alone():
    """A vocabulary may hold the word."""
    fields = {"dtype": "bfloat16", "vocabulary_map": {"dtype": 3}, "quantization_config": {"dtype": "int4"}}
    assert with_older_keys(fields, None) == {**fields, "torch_dtype": "bfloat16"}


def test_a_type_that_transformers_does_not_know_gets_the_commonest_keys():
    rope = {"rope_type": "yarn", "rope_theta": 7.0, "factor": 2.0, "partial_rotary_factor": 0.5}
    result = completed({"model_type": "nobodys", "dtype": "float16", "rope_parameters": rope})
    assert rotary_embedding(result) == (7.0, {"rope_type": "yarn", "factor": 2.0})
    assert (result["partial_rotary_factor"], result["torch_dtype"]) == (0.5, "float16")
    by_type = {"rope_parameters": {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 3.0}}}
    assert completed({"model_type": "nobodys", **by_type}) == {"model_type": "nobodys", **by_type}


def test_nothing_is_added_that_would_be_read_differently():
    """A class that keeps rope_theta as a field of its own, and so would change."""
    fields = {"dtype": "float16", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    result = with_older_keys(fields, lambda config: {key: config[key] for key in config if key != "torch_dtype"})
    assert result == {**fields, "torch_dtype": "float16"}


def full_disk(*_: Any) -> None:
    raise OSError("disk full")


def test_the_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    LlamaConfig(rope_theta=500000.0, dtype="bfloat16").save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="full"):
            add_older_keys(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    add_older_keys(tmp_path)
    assert rotary_embedding(json.loads((tmp_path / "config.json").read_text()))[0] == 500000.0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
