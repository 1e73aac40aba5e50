"""The next layer is calibrated on outputs of the original layers, or of the quantized ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killing import digests
from models import save_model, tiny_gemma3, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_recipe
from torch import Tensor, nn

from hf_awq_offload import ModelStructureError, quantize, quantize_model
from hf_awq_offload.offload.journal import Journal
from hf_awq_offload.pipeline import loop

LAYERS = 4
LAST = f"model.layers.{LAYERS - 1}"


def gram_of_last_layer(monkeypatch, model: nn.Module, propagate: str) -> Tensor:
    """Returns the gram matrix of the last layer's attention input, as its quantization receives it."""
    found = {}
    original = loop.quantize_with_statistics

    def watched(context, structure, statistics, rounder):
        group = next(group for group in structure.groups if "self_attn.q_proj" in group.consumers)
        found[context.name] = statistics.of_group(group).gram.to("cpu", copy=True)
        return original(context, structure, statistics, rounder)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "quantize_with_statistics", watched)
        quantize_model(model, token_recipe(propagate=propagate, bits=2, group_size=32))
    return found[LAST]


@torch.no_grad()
def gram_in_forward_pass(model: nn.Module, norm: nn.Module) -> Tensor:
    """Returns that gram matrix computed from `model`'s own outputs, through the original's norm."""
    seen: list[Tensor] = []
    layer = model.get_submodule(LAST)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(norm(args[0])))
    for sequence in token_recipe().dataset:
        model(torch.tensor([list(sequence)]), use_cache=False)
    handle.remove()
    inputs = torch.cat([each[0] for each in seen])
    return inputs.T @ inputs / len(inputs)


def test_the_next_layer_sees_what_the_setting_says(monkeypatch):
    original = tiny_llama(num_hidden_layers=LAYERS)
    norm = original.get_submodule(f"{LAST}.input_layernorm")
    on_original = gram_in_forward_pass(original, norm)
    for propagate in ("original", "quantized"):
        model = tiny_llama(num_hidden_layers=LAYERS)
        gram = gram_of_last_layer(monkeypatch, model, propagate)
        expected = on_original if propagate == "original" else gram_in_forward_pass(model, norm)
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gram, on_original, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3, tiny_mixtral, tiny_gpt_oss])
def test_quantized_layers_run_again_in_half_precision_and_with_experts(build, dtype):
    model = quantize_model(build().to(dtype), token_recipe(propagate="quantized"))
    assert bool(torch.isfinite(model(torch.tensor([[3, 5, 7]])).logits).all())


class Stopped(BaseException):
    """Stands in for Ctrl-C."""


@pytest.mark.parametrize("harmed", [None, "hidden-00003.bin", "layer-00001.safetensors"])
def test_a_stopped_run_goes_on_to_the_same_bits(harmed: str | None, tmp_path: Path, monkeypatch):
    source = save_model(tiny_llama(num_hidden_layers=LAYERS), tmp_path / "source")
    recipe = token_recipe(propagate="quantized")
    quantize(source, tmp_path / "undisturbed" / "out", recipe)
    commit = Journal.commit

    def stopping(self, index, *args, **kwargs):
        commit(self, index, *args, **kwargs)
        if index == LAYERS - 2:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "commit", stopping)
        with pytest.raises(Stopped):
            quantize(source, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    if harmed is not None:
        (tmp_path / "journal" / harmed).write_bytes(b"")
    quantize(source, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed" / "out")


def test_layers_that_form_no_chain_are_refused_before_anything_is_changed():
    model = tiny_llama()
    run_decoder = type(model.model).forward

    def twice(*args, **kwargs):
        kwargs["inputs_embeds"] = run_decoder(model.model, *args, **kwargs).last_hidden_state
        return run_decoder(model.model, **{**kwargs, "input_ids": None})

    model.model.forward = twice
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelStructureError, match="propagate='original'"):
        quantize_model(model, token_recipe(propagate="quantized"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
