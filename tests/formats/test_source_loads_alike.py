"""Tiny quantized checkpoints on the disk: what transformers loads dequantized has the bits of the virtual tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from quantized_checkpoints import dequantized, float8, random_bytes, recognize, same_bits, uniform
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    LlamaConfig,
    Mxfp4Config,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def llama() -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=48, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    return config, model.state_dict()


def gpt_oss() -> tuple[GptOssConfig, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=48, num_local_experts=2, num_experts_per_tok=1, head_dim=16, tie_word_embeddings=False,
        layer_types=["full_attention"],
    )  # fmt: skip
    return config, AutoModelForCausalLM.from_config(config).to(torch.bfloat16).state_dict()


def save(directory: Path, config, fields: dict, tensors: dict) -> None:
    stored = config.to_dict() | {
        "quantization_config": fields,
        "architectures": [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"],
    }
    (directory / "config.json").write_text(json.dumps(stored, default=str))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", {"format": "pt"})


def assert_loads_alike(directory: Path, config, fields: dict, tensors: dict, own, dtype: torch.dtype) -> None:
    save(directory, config, fields, tensors)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=own)
    loaded = model.state_dict()
    virtual = dequantized(tensors, fields)
    assert virtual
    for name, weight in virtual.items():
        assert same_bits(weight.to(dtype), loaded[name]), name
    parts = {part for weight in recognize(tensors, fields).weights for part in weight.parts.values()}
    rest = tensors.keys() - parts - set(recognize(tensors, fields).unused)
    assert rest | virtual.keys() == loaded.keys()


def quantized(state: dict, parts_of) -> dict:
    """Replaces each linear of a decoder layer by `parts_of(name of the linear, its weight)`."""
    tensors = {}
    for name, tensor in state.items():
        is_linear = "_proj.weight" in name
        tensors |= parts_of(name.removesuffix(".weight"), tensor) if is_linear else {name: tensor}
    return tensors


@DTYPES
def test_fp8(tmp_path, dtype):
    fields = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    config, state = llama()
    tensors = quantized(state, lambda name, weight: {
        f"{name}.weight": float8(tuple(weight.shape), len(name)),
        f"{name}.weight_scale_inv": uniform((weight.shape[0] // 32, weight.shape[1] // 32)),
    })  # fmt: skip
    assert_loads_alike(tmp_path, config, fields, tensors, FineGrainedFP8Config(dequantize=True), dtype)


@DTYPES
def test_mxfp4(tmp_path, dtype):
    fields = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config, state = gpt_oss()
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("_proj"):
            experts, in_features, out = tensor.shape
            tensors[name + "_blocks"] = random_bytes((experts, out, in_features // 32, 16))
            tensors[name + "_scales"] = random_bytes((experts, out, in_features // 32), low=115, high=125)
        else:
            tensors[name] = tensor
    assert_loads_alike(tmp_path, config, fields, tensors, Mxfp4Config(dequantize=True), dtype)


KINDS = {
    "pack-quantized": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    "int-quantized": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "float-quantized": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}


def compress(layout: str, name: str, weight: torch.Tensor) -> dict:
    """As the library packs it, with scales that it would not choose, but could."""
    arguments = KINDS[layout]
    groups = weight.shape[1] // arguments.get("group_size", weight.shape[1])
    state = {"weight": weight, "weight_scale": uniform((weight.shape[0], groups), dtype=torch.bfloat16)}
    if layout == "nvfp4-pack-quantized":
        state["weight_scale"] = state["weight_scale"] * 1000
        state["weight_global_scale"] = torch.tensor([9000.0])
    if not arguments.get("symmetric", True):
        state["weight_zero_point"] = random_bytes((weight.shape[0], groups), high=8).to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], format=layout, weights=QuantizationArgs(**arguments))
    compressed = BaseCompressor.get_value_from_registry(layout).compress(state, scheme)
    return {f"{name}.{part}": tensor for part, tensor in compressed.items()}


@DTYPES
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("layout", KINDS)
def test_compressed_tensors(tmp_path, layout, dtype):
    group = {"targets": ["Linear"], "format": layout, "weights": KINDS[layout]}
    fields = {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    config, state = llama()
    tensors = quantized(state, lambda name, weight: compress(layout, name, weight))
    assert_loads_alike(tmp_path, config, fields, tensors, CompressedTensorsConfig(dequantize=True), dtype)
