"""A checkpoint may hold experts fused although those of its type hold them one by one, or the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_mixtral, token_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import AwqLinear, plan, quantize

NAME = "model.safetensors"


def saved(model: PreTrainedModel, folder: Path, fused_layers: tuple[int, ...]) -> Path:
    """Saves a model, the experts of some layers as the model holds them."""
    model.save_pretrained(folder)
    tensors = load_file(folder / NAME)
    for layer in fused_layers:
        tensors = {name: value for name, value in tensors.items() if f"layers.{layer}.block_sparse_moe.exp" not in name}
        stacks = f"model.layers.{layer}.mlp.experts."
        tensors |= {name: value for name, value in model.state_dict().items() if name.startswith(stacks)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / NAME, {"format": "pt"})
    return folder


def values(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "experts" in name}


@pytest.mark.parametrize("fused_layers", [(0, 1), (1,)])
def test_experts_are_quantized_however_the_checkpoint_holds_them(fused_layers, tmp_path):
    apart, fused = (saved(tiny_mixtral(), tmp_path / str(layers), layers) for layers in ((), fused_layers))
    quantize(apart, tmp_path / "expected", token_recipe())
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expected")
    assert isinstance(expected.model.layers[1].mlp.experts.get_submodule("0.w2"), AwqLinear)
    quantize(fused, tmp_path / "streamed", token_recipe())
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")]
    for offload in ("cpu", "disk"):
        scratch = tmp_path / "scratch"
        recipe = token_recipe(offload=offload)
        found += [AutoModelForCausalLM.from_pretrained(fused, quantization_config=recipe, offload_folder=scratch)]
    for model in found:
        assert values(model).keys() == values(expected).keys()
        assert all(torch.equal(value, values(expected)[name]) for name, value in values(model).items())
    planned, wanted = (plan(folder, token_recipe(), probe=False) for folder in (fused, apart))
    assert planned.ram_peak_bytes == pytest.approx(wanted.ram_peak_bytes, rel=0.5)


def test_a_pickled_checkpoint_with_fused_experts(tmp_path):
    source = saved(tiny_mixtral(), tmp_path / "source", (0, 1))
    expected = AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe())
    torch.save(load_file(source / NAME), source / "pytorch_model.bin")
    (source / NAME).unlink()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe())
    assert values(model).keys() == values(expected).keys()
    assert all(torch.equal(value, values(expected)[name]) for name, value in values(model).items())
