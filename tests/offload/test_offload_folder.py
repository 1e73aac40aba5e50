"""Quantized layers that stay on disk give the same model with less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_batch, token_recipe
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_awq_offload import AwqLinear, ConfigError, StorageError, quantize_model
from hf_awq_offload.errors import ModelStructureError
from hf_awq_offload.offload.offload_folder import OffloadFolder
from hf_awq_offload.pipeline import loop

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

LAYERS = 4
ALL = {"": "disk"}
MOST = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"} | {
    f"model.layers.{index}": "cpu" if index == 1 else "disk" for index in range(LAYERS)
}
PARTS_OF_A_LAYER = MOST | {
    "model.layers.1.self_attn": "cpu",
    "model.layers.1.mlp": "disk",
    "model.layers.1.input_layernorm": "disk",
    "model.layers.1.post_attention_layernorm": "cpu",
}
del PARTS_OF_A_LAYER["model.layers.1"]

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "llama in bf16, tied": lambda: tiny_llama(num_hidden_layers=LAYERS, tie_word_embeddings=True).to(torch.bfloat16),
    "mixtral": lambda: tiny_mixtral(num_hidden_layers=LAYERS),
    "gpt_oss": lambda: tiny_gpt_oss(num_hidden_layers=LAYERS),
}


@pytest.fixture(scope="module", params=MODELS)
def source(request, tmp_path_factory) -> Path:
    return save_model(MODELS[request.param](), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def in_ram(source, tmp_path_factory) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits, and the checkpoint's tensors."""
    model = quantized(source)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return logits(model), weights_in(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("llama"))


def quantized(source: Path, **kwargs) -> PreTrainedModel:
    # The int4 kernel of a CPU wants its own layout, which weights on the disk are not in; torch computes both the same.
    recipe = token_recipe(checkpoint_dir=kwargs.pop("checkpoint_dir", None), backend="torch")
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe, dtype="auto", **kwargs)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_batch(2, 9)).logits


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def bytes_in_ram(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("device_map", [ALL, MOST, PARTS_OF_A_LAYER], ids=["all", "most", "parts of a layer"])
def test_what_stays_on_the_disk_computes_the_same(device_map, source, in_ram, tmp_path):
    if "gpt_oss" in str(source) and device_map is PARTS_OF_A_LAYER:
        device_map = device_map | {"model.layers.1.self_attn": "disk"}
    model = quantized(source, device_map=dict(device_map), offload_folder=tmp_path / "offload")
    linear = next(module for module in model.model.layers[0].modules() if isinstance(module, AwqLinear))
    assert linear.qweight.is_meta
    assert model.hf_device_map == device_map
    model.save_pretrained(tmp_path / "saved")
    saved = weights_in(tmp_path / "saved")
    assert saved.keys() == in_ram[1].keys()
    assert all(
        torch.equal(saved[name], value) and saved[name].dtype == value.dtype for name, value in in_ram[1].items()
    )


def test_less_is_in_ram(llama, tmp_path):
    everything = bytes_in_ram(quantized(llama))
    most = quantized(llama, device_map=dict(MOST), offload_folder=tmp_path / "most")
    kept = [most.model.embed_tokens, most.model.norm, most.model.layers[1]]
    assert bytes_in_ram(most) == sum(p.numel() * p.element_size() for part in kept for p in part.parameters())
    assert bytes_in_ram(most) < 0.5 * everything
    assert bytes_in_ram(quantized(llama, device_map=dict(ALL), offload_folder=tmp_path / "all")) == 0


def test_finished_layers_leave_ram_one_by_one(llama, tmp_path, monkeypatch):
    """While the last layer is quantized, no earlier one is in RAM, in full precision or quantized."""
    seen, layers = [], []
    search, build = loop.quantize_with_statistics, LlamaForCausalLM.__init__

    def watched_build(self, *args, **kwargs):
        build(self, *args, **kwargs)
        layers.extend(self.model.layers)

    def watched(*args, **kwargs):
        seen.append(sum(any(not parameter.is_meta for parameter in layer.parameters()) for layer in layers))
        return search(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", watched_build)
    monkeypatch.setattr(loop, "quantize_with_statistics", watched)
    quantized(llama, device_map=dict(ALL), offload_folder=tmp_path / "offload")
    assert seen == [1] * LAYERS


def test_a_run_that_goes_on_puts_finished_layers_there_too(llama, tmp_path, monkeypatch):
    expected = logits(quantized(llama, checkpoint_dir=tmp_path / "journal"))

    def fail(*args, **kwargs):
        raise AssertionError("a layer that is in the journal was quantized again")

    monkeypatch.setattr(loop, "quantize_with_statistics", fail)
    model = quantized(
        llama, device_map=dict(ALL), offload_folder=tmp_path / "offload", checkpoint_dir=tmp_path / "journal"
    )
    assert bytes_in_ram(model) == 0
    assert torch.equal(logits(model), expected)


def test_the_map_that_transformers_makes_may_have_the_disk_in_it(llama, tmp_path):
    expected = logits(quantized(llama))
    model = quantized(llama, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "offload")
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    assert 0 < bytes_in_ram(model) < 60_000
    assert torch.equal(logits(model), expected)


def test_without_a_folder_nothing_is_begun(llama, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("quantization began")

    monkeypatch.setattr(loop, "quantize_with_statistics", fail)
    with pytest.raises(ConfigError, match=r"no folder for the quantized weights; pass offload_folder"):
        quantized(llama, device_map=dict(MOST))


def test_weights_that_can_not_be_read_lazily_are_refused(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"device_map has modules on 'disk'.*pytorch_model\.bin"):
        quantized(tmp_path, device_map=dict(ALL), offload_folder=tmp_path / "offload")


def test_a_folder_that_can_not_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not be written to the offload_folder .*Make room"):
        OffloadFolder(tmp_path / "file", ALL).put("a", {"a": torch.ones(1)})


def test_a_model_with_layers_on_the_disk_is_not_quantized_in_place(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, device_map=dict(MOST), offload_folder=tmp_path / "offload")
    expected = logits(model)
    with pytest.raises(ModelStructureError, match=r"has layers on disk.*from_pretrained"):
        quantize_model(model, token_recipe())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", False),
        ("a.b", True),
        ("a.b.c", True),
        ("a.bc", False),
        ("d", True),
        ("d.e.f", True),
        ("g", False),
    ],
)
def test_which_modules_belong_there(name, expected):
    folder = OffloadFolder(Path(), {"": "cpu", "a.b": "disk", "a.bc": "cpu", "d.e": "disk", "d.f": "disk"})
    assert folder.has(name) == expected
