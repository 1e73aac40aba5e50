"""Arguments that name nothing are refused with what was meant, before a weight is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_model, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig

from hf_awq_offload import AwqOffloadConfig, AwqOffloadError, ConfigError, plan, quantize, quantize_model
from hf_awq_offload.checkpoint import stored_tensor
from hf_awq_offload.formats.nearest_names import nearest_names
from hf_awq_offload.nn.quantized_linear import QuantizedLinear
from hf_awq_offload.offload import stored_weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return save_model(tiny_mixtral(), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    return save_model(tiny_gpt_oss(), tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture
def no_weight_is_read(monkeypatch) -> None:
    def read(*args, **kwargs):
        raise AssertionError("a weight was read")

    for owner in (stored_weights, stored_tensor):
        monkeypatch.setattr(owner, "read", read)


# -- modules_to_not_convert --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "nearest"),
    [
        ("lm_haed", r"'lm_head'"),
        ("down_porj", r"'down_proj'"),
        ("model.layer.1", r"'model\.layers'"),
        ("model.layers.7.mlp", r"'model\.layers\.[01]\.mlp'"),
        (r"model\.layers\.0\.self_atn", r"'model\.layers\.0\.self_attn'"),
    ],
)
@pytest.mark.usefixtures("no_weight_is_read")
def test_an_entry_that_names_no_module_is_an_error_with_the_nearest_names(entry, nearest, llama, tmp_path):
    recipe = token_recipe(modules_to_not_convert=["lm_head", entry])
    with pytest.raises(ConfigError) as caught:
        quantize(llama, tmp_path / "out", recipe)
    assert f"modules_to_not_convert has the entry {entry!r}, which names no module" in str(caught.value)
    found = str(caught.value).partition("did you mean ")[2].partition("? Correct")[0]
    assert re.search(nearest, found), found
    assert list(tmp_path.iterdir()) == []


def test_it_is_an_error_wherever_the_recipe_goes(llama):
    recipe = token_recipe(modules_to_not_convert=["down_porj"])
    with pytest.raises(ConfigError, match="'down_porj', which names no module"):
        plan(llama, recipe)
    with pytest.raises(ConfigError, match="'down_porj', which names no module"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=recipe)
    model = tiny_llama()
    with pytest.raises(ConfigError, match="'down_porj', which names no module"):
        quantize_model(model, recipe)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize("names", ["mixtral", "gpt_oss"])
def test_a_mistyped_expert_is_an_error_before_experts_are_there(names, request, tmp_path, no_weight_is_read):
    source = request.getfixturevalue(names)
    with pytest.raises(ConfigError, match=r"did you mean .*'experts'"):
        quantize(source, tmp_path / "out", token_recipe(modules_to_not_convert=["expert"]))
    with pytest.raises(ConfigError, match=r"expets.*matches no linear's name\. Did you mean .*experts"):
        quantize(source, tmp_path / "out", token_recipe(overrides={r"expets\.1": {"bits": 8}}))


def quantized_linears(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(
    ("source", "entries", "kept"),
    [
        ("llama", ["lm_head", "embed_tokens", "norm", "model.layers.1"], "model.layers.1."),
        ("llama", ["layers.1", "input_layernorm"], "model.layers.1."),
        ("llama", ["self_attn"], ".self_attn."),
        ("mixtral", ["experts"], ".experts."),
        ("mixtral", ["experts.1.w2", "gate"], "experts.1.w2"),
        ("gpt_oss", ["experts"], ".experts."),
        ("gpt_oss", ["experts.1.down_proj", "router"], "experts.1.down_proj"),
        ("mixtral", [r"model\.layers\.1\.block_sparse_moe\.experts"], "model.layers.1.mlp.experts."),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_modules_of_every_kind_may_be_named_by_the_models_names_and_by_the_checkpoints(source, entries, kept, request):
    """Mixtral's checkpoints say block_sparse_moe.experts where its model says mlp.experts."""
    recipe = token_recipe(modules_to_not_convert=entries)
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(source), quantization_config=recipe)
    names = quantized_linears(model)
    assert names
    assert [name for name in names if kept in name] == []
    everything = set(dict(model.named_modules()))
    assert any(kept in f"{name}." for name in everything)


def test_a_module_that_only_the_checkpoint_has_may_be_named(llama, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors") | {"mtp.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "out", token_recipe(modules_to_not_convert=["mtp.layers.0"], n_grid=1))
    assert "mtp.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_the_nearest_names_are_of_as_many_parts():
    names = [f"model.layers.{layer}.{part}" for layer in range(30) for part in ("mlp.up_proj", "self_attn.o_proj")]
    assert nearest_names("self_atn.o_proj", names) == ["self_attn.o_proj"]
    assert nearest_names("upproj", names)[0] == "up_proj"
    assert len(nearest_names("zzz", names)) == 1


# -- dtype -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float17", "int8", "nn", "torch.bfloat16", torch.int8, 16, {"": "float17"}])
@pytest.mark.usefixtures("no_weight_is_read")
def test_a_dtype_that_is_none_is_an_error_with_the_names_that_are(dtype, llama, tmp_path):
    for call in (
        lambda: quantize(llama, tmp_path / "out", token_recipe(), dtype=dtype),
        lambda: plan(llama, token_recipe(), dtype=dtype),
        lambda: AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, quantization_config=token_recipe()),
    ):
        with pytest.raises(ConfigError, match=r"dtype is .*; pass one of auto, bfloat16, float16, float32"):
            call()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "half", torch.float32, None])
def test_other_dtypes_load(dtype, llama):
    assert plan(llama, token_recipe(), dtype=dtype, probe=False).layers == 2


# -- the config of another method --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [AwqConfig(), {"quant_method": "awq", "bits": 4, "group_size": 128}])
def test_a_config_that_describes_a_checkpoint_is_no_recipe(config, llama):
    with pytest.raises(AwqOffloadError, match=r"which only describes a checkpoint .*; pass an AwqOffloadConfig"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)


def test_it_is_none_for_the_functions_either(llama, tmp_path):
    config: Any = AwqConfig()
    for call in (
        lambda: quantize(llama, tmp_path / "out", config),
        lambda: plan(llama, config),
        lambda: quantize_model(tiny_llama(), config),
    ):
        with pytest.raises(
            ConfigError, match=r"config is a AwqConfig, which only describes .*pass an AwqOffloadConfig"
        ):
            call()
    with pytest.raises(ConfigError, match=r"^config is a dict; pass an AwqOffloadConfig"):
        quantize(llama, tmp_path / "out", {"bits": 4})  # type: ignore[arg-type]


def test_an_unknown_key_of_an_override_and_an_entry_that_is_no_expression_are_errors():
    with pytest.raises(ConfigError, match=r"overrides\['down_proj'\] has no field 'bit'; did you mean 'bits'"):
        AwqOffloadConfig(overrides={"down_proj": {"bit": 8}})
    with pytest.raises(ConfigError, match=r"the entry 'mlp\[', which is not a valid regular expression"):
        AwqOffloadConfig(modules_to_not_convert=["mlp["])
