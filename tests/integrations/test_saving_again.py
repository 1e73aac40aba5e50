"""Tensors that the model has no place for outlive every save: into the folder they come from, or over an older one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_qwen2
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, CheckpointError
from hf_awq_offload.nn.quantized_linear import QuantizedLinear

CARRIED = {f"mtp.layers.0.{name}.weight": torch.full((4, 6), float(number)) for number, name in enumerate("abc")}
DATA = [[(7 * row + 3 * i + i * i) % 60 for i in range(24)] for row in range(2)]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = save_model(tiny_qwen2(), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | CARRIED, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantized(source: Path) -> PreTrainedModel:
    recipe = AwqOffloadConfig(dataset=DATA, group_size=32, max_seq_len=24, n_grid=1, clip=False)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value.clone() for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_whole(folder: Path) -> None:
    tensors = tensors_in(folder)
    assert all(torch.equal(tensors[name], value) for name, value in CARRIED.items())
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_into_the_folder_of_the_source(source):
    model = quantized(source)
    model.save_pretrained(source)
    assert_whole(source)
    model.save_pretrained(source.with_name("elsewhere"))
    assert_whole(source.with_name("elsewhere"))


def test_a_reloaded_model_into_its_own_folder(source, tmp_path):
    quantized(source).save_pretrained(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    assert_whole(tmp_path / "out")


@pytest.mark.parametrize("sizes", [("50GB", "50GB"), ("50GB", "20KB", "50GB")])
def test_over_what_was_saved_before(sizes, source, tmp_path):
    model = quantized(source)
    for size in sizes:
        model.save_pretrained(tmp_path / "out", max_shard_size=size)
        assert_whole(tmp_path / "out")


def test_a_model_that_is_dequantized_before(source, tmp_path):
    model = quantized(source)
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    tensors = tensors_in(tmp_path / "dense")
    assert all(torch.equal(tensors[name], value) for name, value in CARRIED.items())
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    assert not (tmp_path / "dense" / "README.md").exists()


@pytest.mark.parametrize("what_happened", ["gone", "changed"])
def test_a_source_that_is_no_longer_there(what_happened, source, tmp_path):
    model = quantized(source)
    if what_happened == "gone":
        shutil.rmtree(source)
    else:
        save_file({"other": torch.zeros(1 << 16)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{what_happened}.* is saved in "):
        model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").exists()
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]["missing_keys"]
