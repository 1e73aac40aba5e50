"""A checkpoint whose head is tied to the embedding may hold one of the two, both, or two of different values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_llama, token_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import CheckpointError, plan, quantize

NAME = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, Tensor]


def changed(folder: Path, change: Callable[[Tensors], Tensors], **config: bool) -> Path:
    save_model(tiny_llama(**config), folder)
    save_file(change(load_file(folder / NAME)), folder / NAME, {"format": "pt"})
    return folder


def with_both(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


def with_head_alone(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()}


def with_another_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(1))}


def quantized_on(path: str, source: Path, out: Path) -> Path:
    if path == "streamed":
        quantize(source, out, token_recipe())
        return out
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=token_recipe(offload=path), offload_folder=out.with_name("scratch")
    )
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(("change", "held"), [(with_both, 1), (with_head_alone, 1), (with_another_head, 2)])
def test_every_path_keeps_the_values_that_the_source_has(change, held, tmp_path):
    source = changed(tmp_path / "source", change, tie_word_embeddings=True)
    original: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    for path in ("streamed", "cpu", "disk"):
        out = quantized_on(path, source, tmp_path / path)
        names = {HEAD, EMBEDDING} & load_file(out / NAME).keys()
        assert len(names) == held
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(loaded.lm_head.weight, original.lm_head.weight)
        assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_two_tensors_for_one_parameter_are_refused(tmp_path):
    def with_another_layer(tensors: Tensors) -> Tensors:
        extra = {name.removeprefix("model."): value + 1 for name, value in tensors.items() if "layers.0.mlp" in name}
        return tensors | extra

    source = changed(tmp_path / "source", with_another_layer)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.\w+\.weight and model\.layers\.0\.mlp.* expected one"):
        plan(source, token_recipe(), probe=False)
