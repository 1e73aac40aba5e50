"""A source whose config.json says nonsense is refused by name, before transformers builds anything large from it."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import save_model, tiny_llama, tiny_mixtral, token_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_awq_offload import AwqOffloadError, CheckpointError, ModelStructureError, quantize

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000, .* can't hold so many layers"),
    "layers beyond counting": ({"num_hidden_layers": 10**30}, "can't hold so many layers"),
    "a size that is a text": ({"hidden_size": "64"}, r"config\.json"),
    "a size that is a list": ({"intermediate_size": [96]}, r"config\.json"),
    "no heads": ({"num_attention_heads": 0}, r"config\.json"),
    "rotary embeddings of nothing": ({"rope_parameters": {"rope_type": ["default"]}}, r"config\.json"),
    "a type that is a number": ({"model_type": 5}, r"of the type '5'"),
    "a type that nobody knows": ({"model_type": "no-such-type"}, r"of the type 'no-such-type', which transformers"),
    "an activation that is none": ({"hidden_act": "rm -rf"}, r"config\.json"),
    "a dtype that is a function": ({"dtype": "load", "torch_dtype": "load"}, r"config\.json"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("source") / "llama")


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("what", CHANGES)
def test_a_config_that_says_nonsense_is_refused(what, llama, tmp_path):
    changes, why = CHANGES[what]
    folder = with_config(llama, tmp_path / "theirs", **changes)
    with pytest.raises((CheckpointError, ModelStructureError), match=why):
        quantize(folder, tmp_path / "out", token_recipe())
    assert not (tmp_path / "out").exists()
    with pytest.raises((CheckpointError, ModelStructureError), match=why):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=token_recipe())


def test_a_field_that_only_speaks_of_layers_counts_none(llama, tmp_path):
    folder = with_config(llama, tmp_path / "theirs", vocab_size_per_layer_input=262_144, my_layer_seed=123_456)
    assert quantize(folder, tmp_path / "out", token_recipe()).layers


class OwnConfig(LlamaConfig):
    model_type = ""  # config.json then names none


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_class_with_a_config_of_its_own_reads_it(tmp_path):
    OwnModel(OwnConfig(**tiny_llama().config.to_diff_dict())).save_pretrained(tmp_path / "own")
    assert not json.loads((tmp_path / "own" / "config.json").read_text()).get("model_type")
    model = OwnModel.from_pretrained(tmp_path / "own", quantization_config=token_recipe())
    assert model.hf_quantizer.report.layers


def test_a_misspelt_argument_is_not_blamed_on_the_checkpoint(llama):
    with pytest.raises(TypeError, match="tie_weight"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=token_recipe(), tie_weight=1)


def test_a_key_that_config_json_has_twice_is_read_as_by_transformers(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "theirs")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"use_cache": false, "use_cache": true,', 1))
    assert quantize(folder, tmp_path / "out", token_recipe()).layers


def test_a_model_of_more_modules_than_the_files_account_for_is_not_built(tmp_path):
    source = save_model(tiny_mixtral(), tmp_path / "source")
    folder = with_config(source, tmp_path / "theirs", num_local_experts=10**9, num_hidden_layers=9_999)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"a model of more than \d+ modules, and the checkpoint holds \d+"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=token_recipe())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_an_error_of_ours(value, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AwqOffloadError, match=r"model\.layers\.0"):
        quantize(folder, tmp_path / "out", token_recipe())
    assert not (tmp_path / "out").exists()
