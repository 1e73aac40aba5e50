"""A source that is quantized already gives, to the bit, what its dequantized copy gives, on every path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gpt_oss, tiny_llama, tiny_mixtral, tiny_qwen3, token_recipe
from quantized_sources import MXFP4_FIELDS, fp8_blocks, fp8_per_tensor, mxfp4_experts, save_quantized
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from hf_awq_offload import plan, quantize
from hf_awq_offload.checkpoint.opened import read_json

BLOCKS, FP8_FIELDS = fp8_blocks(32)
SOURCES: dict[str, Callable[[Path], Path]] = {
    "fp8 blocks, qwen3": lambda folder: save_quantized(tiny_qwen3(), folder, BLOCKS, FP8_FIELDS),
    "fp8 blocks, qwen3 in three files": lambda folder: save_quantized(tiny_qwen3(), folder, BLOCKS, FP8_FIELDS, 3),
    "fp8 blocks, llama, tied": lambda folder: save_quantized(
        tiny_llama(tie_word_embeddings=True), folder, BLOCKS, FP8_FIELDS
    ),
    "mxfp4, gpt_oss": lambda folder: save_quantized(
        tiny_gpt_oss(intermediate_size=64), folder, mxfp4_experts, MXFP4_FIELDS
    ),
}
DEQUANTIZING = {"fp8": partial(FineGrainedFP8Config, dequantize=True), "mxfp4": partial(Mxfp4Config, dequantize=True)}


def dense_copy(source: Path, folder: Path, kind: str) -> Path:
    """Saves what transformers itself makes of a quantized checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=DEQUANTIZING[kind](), dtype="auto")
    assert model.dtype == torch.bfloat16
    model._weight_conversions = None  # transformers 5.23 would reverse the dequantization, and save nonsense
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_result(folder: Path, expected: Path) -> None:
    """Compares tensors and config.json, which only differs in where the weights come from."""
    ours, wanted = tensors_of(folder), tensors_of(expected)
    assert ours.keys() == wanted.keys()
    assert any(name.endswith(".qweight") for name in ours)
    for name, value in ours.items():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name
    config = read_json(folder / "config.json")
    assert config["quantization_config"]["meta"].pop("dequantized_from")
    assert config == read_json(expected / "config.json")


def in_memory(source: Path, folder: Path, **changes: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=token_recipe(**changes), dtype="auto", offload_folder=folder.with_name("scratch")
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", SOURCES)
def test_result_is_that_of_the_copy_that_transformers_dequantizes(kind, tmp_path):
    source = SOURCES[kind](tmp_path / "source")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    dense = dense_copy(source, tmp_path / "dense", kind.split()[0].rstrip(","))
    quantize(dense, tmp_path / "expected", token_recipe())
    quantize(source, tmp_path / "streamed", token_recipe())
    assert_same_result(tmp_path / "streamed", tmp_path / "expected")
    for offload in ("cpu", "disk"):
        assert_same_result(in_memory(source, tmp_path / offload, offload=offload), tmp_path / "expected")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_experts_in_fp8_that_are_stored_one_by_one(tmp_path):
    def store(name: str, value: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith((".w1.weight", ".w2.weight", ".w3.weight")):
            return BLOCKS(name, value)
        return {name.removesuffix("weight") + key.rpartition(".")[2]: part for key, part in _as_projection(value)}

    def _as_projection(value: Tensor) -> list[tuple[str, Tensor]]:
        return list((BLOCKS("x_proj.weight", value) or {}).items())

    source = save_quantized(tiny_mixtral(intermediate_size=96), tmp_path / "source", store, FP8_FIELDS)
    dense = dense_copy(source, tmp_path / "dense", "fp8")
    quantize(dense, tmp_path / "expected", token_recipe())
    quantize(source, tmp_path / "streamed", token_recipe())
    assert_same_result(tmp_path / "streamed", tmp_path / "expected")


def test_scales_that_config_json_does_not_mention_are_applied(tmp_path):
    source = save_quantized(tiny_llama(), tmp_path / "source", fp8_per_tensor, fields=None)
    original = tiny_llama()
    quantize(source, tmp_path / "out", token_recipe())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = loaded.model.layers[1].get_submodule(name).weight
        true = original.model.layers[1].get_submodule(name).weight
        assert 0.8 < float(weight.detach().norm() / true.detach().norm()) < 1.25


def test_the_result_loads_and_computes_what_the_source_does(tmp_path):
    source = SOURCES["fp8 blocks, qwen3"](tmp_path / "source")
    quantize(source, tmp_path / "out", token_recipe())
    ids = torch.arange(3, 40).unsqueeze(0)
    dense = AutoModelForCausalLM.from_pretrained(dense_copy(source, tmp_path / "dense", "fp8"), dtype=torch.float32)
    with torch.no_grad():
        wanted = dense(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.3


def test_the_plan_counts_full_precision(tmp_path):
    source = SOURCES["fp8 blocks, qwen3"](tmp_path / "source")
    dense = dense_copy(source, tmp_path / "dense", "fp8")
    planned, expected = (plan(folder, token_recipe(), probe=False) for folder in (source, dense))
    assert planned == expected


def test_a_journal_knows_how_the_source_was_quantized(tmp_path):
    source = SOURCES["fp8 blocks, qwen3"](tmp_path / "source")
    quantizer_of(source, tmp_path / "journal")
    assert "fp8" in (tmp_path / "journal" / "journal.json").read_text()


def quantizer_of(source: Path, journal: Path) -> PreTrainedModel:
    recipe = token_recipe(checkpoint_dir=journal)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe, dtype="auto")


def test_a_part_of_the_result_may_stay_on_the_disk(tmp_path):
    """lm_head is in FP8 here: accelerate's hooks cannot dequantize it, so a dense copy goes to the folder."""

    def store(name: str, value: Tensor) -> dict[str, Tensor] | None:
        if name != "lm_head.weight":
            return BLOCKS(name, value)
        return {key.replace("x_proj", "lm_head"): part for key, part in (BLOCKS("x_proj.weight", value) or {}).items()}

    source = save_quantized(tiny_llama(), tmp_path / "source", store, FP8_FIELDS)
    ids = torch.arange(3, 40).unsqueeze(0)
    logits = []
    for device_map in ({"": "cpu"}, {"model": "cpu", "lm_head": "disk"}):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=token_recipe(),
            dtype="auto",
            device_map=device_map,
            offload_folder=tmp_path / "offloaded",
        )
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
