"""What the look at a source says and does beyond refusing: warnings, conversions, heads, files in the cache."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_llama, tiny_mixtral, tiny_qwen2, token_recipe
from quantized_sources import Stored, fp8_blocks, fp8_per_tensor, save_quantized
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
)

from hf_awq_offload import CheckpointError, quantize
from hf_awq_offload.checkpoint.opened import read_json
from hf_awq_offload.checkpoint.safetensors import tensor_places

NAME = "model.safetensors"
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in tensor_places(file)}


def without(folder: Path, *lost: str) -> Path:
    tensors = {name: value for name, value in load_file(folder / NAME).items() if name not in lost}
    save_file(tensors, folder / NAME, {"format": "pt"})
    return folder


@pytest.mark.parametrize("lost", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_small_weight_may_not_be_missing_either(lost, tmp_path):
    source = without(save_model(tiny_qwen2(), tmp_path / "source"), lost)
    with pytest.raises(CheckpointError, match=lost):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe(), dtype="auto")


def test_an_expert_may_not_be_missing(tmp_path):
    source = save_model(tiny_mixtral(), tmp_path / "source")
    lost = next(name for name in load_file(source / NAME) if ".experts.2.w3" in name)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3"):
        quantize(without(source, lost), tmp_path / "out", token_recipe())
    assert not (tmp_path / "out").exists()


def test_tied_weights_need_not_be_there(tmp_path):
    source = save_model(tiny_qwen2(tie_word_embeddings=True), tmp_path / "source")
    assert "lm_head.weight" not in load_file(source / NAME)
    quantize(source, tmp_path / "out", token_recipe())
    names = names_in(tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.qweight" in names
    assert "lm_head.weight" not in names


def test_a_head_that_is_to_be_trained_may_be_missing(tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(
        source, quantization_config=token_recipe(), dtype="auto", num_labels=3
    )
    assert model.score.weight.shape == (3, 64)


def test_scales_of_activations_are_left_out_with_a_warning(tmp_path, caplog):
    source = save_quantized(tiny_llama(), tmp_path / "source", fp8_per_tensor, None)
    with caplog.at_level(logging.WARNING):
        quantize(source, tmp_path / "out", token_recipe())
    assert "14 scales of activations" in caplog.text
    assert not any("input_scale" in name for name in names_in(tmp_path / "out"))


def glm_with_mtp(folder: Path) -> Path:
    """Saves a GLM-4.5 with FP8 weights and one more decoder layer, of experts, than its config counts."""
    config = Glm4MoeConfig(
        **SHAPE,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    )
    torch.manual_seed(0)
    store, fields = fp8_blocks(32)

    def with_another_layer(name: str, value: Tensor) -> Stored | None:
        stored = store(name, value) or {name: value}
        if ".layers.1." in name:
            stored |= {key.replace(".layers.1.", ".layers.2."): part.clone() for key, part in stored.items()}
        return stored

    return save_quantized(Glm4MoeForCausalLM(config), folder, with_another_layer, fields)


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_layers_for_multi_token_prediction_in_fp8(mtp, tmp_path, caplog):
    source, out = glm_with_mtp(tmp_path / "source"), tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        quantize(source, out, token_recipe(mtp=mtp))
    kept = {name for name in names_in(out) if name.startswith("model.layers.2.")}
    assert "model.layers.2." in caplog.text
    assert read_json(out / "config.json")["num_nextn_predict_layers"] == int(mtp == "keep")
    if mtp == "drop":
        assert not kept
        return
    assert kept == {name for name in names_in(source) if ".layers.2." in name and not name.endswith("_scale_inv")}
    tensors, stored = load_file(out / NAME), load_file(source / NAME)
    for name in kept:
        value = stored[name].float()
        if f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"]
            value = value * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(tensors[name].float(), value.to(torch.bfloat16).float()), name


def test_files_that_are_read_in_a_way_of_its_own_are_refused(tmp_path):
    source = save_quantized(tiny_qwen2(), tmp_path / "source", *fp8_blocks(32))
    with pytest.raises(CheckpointError, match="disable_mmap"):
        AutoModelForCausalLM.from_pretrained(
            source, quantization_config=token_recipe(), dtype="auto", disable_mmap=True
        )


def test_a_dtype_is_found_although_the_first_weights_are_in_fp8(tmp_path):
    source = save_quantized(tiny_qwen2(), tmp_path / "source", *fp8_blocks(32))
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"dtype": "bfloat16",', ""))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe(), dtype="auto")
    assert model.dtype == torch.bfloat16


def test_transformers_reads_such_a_source_as_before(tmp_path):
    """Only calls with a recipe are served by this package's reader."""
    source = save_quantized(tiny_qwen2(), tmp_path / "source", *fp8_blocks(32))
    quantize(source, tmp_path / "out", token_recipe())
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    weight = model.model.layers[0].mlp.up_proj.weight.detach().float()
    true = tiny_qwen2().model.layers[0].mlp.up_proj.weight.detach()
    assert float((weight - true).norm() / true.norm()) < 0.05


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    source = without(save_model(tiny_qwen2(), tmp_path / "source"), "model.norm.weight")
    with pytest.raises(CheckpointError):
        quantize(source, tmp_path / "out", token_recipe(report_dir=tmp_path / "report"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    shutil.rmtree(source)
