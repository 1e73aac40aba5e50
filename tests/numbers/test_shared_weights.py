"""Weights that several modules share: each place gets a quantized copy of its own, and no scale leaks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny_llama, token_batch, token_recipe
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import NumericalError, quantize_model
from hf_awq_offload.model.decoder_layers import shared_parameters
from hf_awq_offload.model.folds import SHARED
from hf_awq_offload.nn.quantized_linear import QuantizedLinear


def same_parameter(one: str, other: str) -> Callable[[Any], None]:
    """Gives two modules one Parameter as their weight."""
    return lambda model: setattr(model.get_submodule(other), "weight", model.get_submodule(one).weight)


def same_memory(one: str, other: str) -> Callable[[Any], None]:
    """Gives two modules Parameters of their own, of one memory."""
    return lambda model: setattr(
        model.get_submodule(other), "weight", nn.Parameter(model.get_submodule(one).weight.data)
    )


FIRST, SECOND = "model.layers.0", "model.layers.1"
SHARING: dict[str, Callable[[Any], None]] = {
    "a linear of two layers": same_parameter(f"{FIRST}.mlp.up_proj", f"{SECOND}.mlp.up_proj"),
    "a producer of two layers": same_parameter(f"{FIRST}.self_attn.v_proj", f"{SECOND}.self_attn.v_proj"),
    "a norm of two layers": same_parameter(f"{FIRST}.input_layernorm", f"{SECOND}.input_layernorm"),
    "two linears of one input": same_parameter(f"{FIRST}.mlp.up_proj", f"{FIRST}.mlp.gate_proj"),
    "a producer and its consumer": same_parameter(f"{FIRST}.self_attn.q_proj", f"{FIRST}.self_attn.o_proj"),
    "keys and values": same_parameter(f"{FIRST}.self_attn.k_proj", f"{FIRST}.self_attn.v_proj"),
    "the memory of two norms": same_memory(f"{FIRST}.input_layernorm", f"{SECOND}.input_layernorm"),
    "the memory of two linears": same_memory(f"{FIRST}.mlp.up_proj", f"{SECOND}.mlp.up_proj"),
}


def sharing(how: str) -> PreTrainedModel:
    """Returns a model that shares weights, its norms such that scales are worth much."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:4] *= 30
    SHARING[how](model)
    return model


@pytest.mark.parametrize("how", SHARING)
@torch.no_grad()
def test_a_model_that_shares_weights_loses_less_than_copies_that_are_rounded_to_nearest(how):
    """A scale that one place folds into what both read would show, above all at 8 bits. Copies can get more scales."""
    model, apart = sharing(how), tiny_llama()
    apart.load_state_dict(copy.deepcopy(model.state_dict()))
    expected = model(token_batch(4, 16)).logits
    recipe = token_recipe(bits=8, format="compressed-tensors", group_size=32, zero_point=False)
    nearest = dataclasses.replace(recipe, rounding="nearest", n_grid=0, clip=False)
    quantized = quantize_model(model, recipe)
    groups = [group for layer in quantized.hf_quantizer.report.layers for group in layer.groups]
    assert any(group.alpha is not None for group in groups)
    models = (quantized, quantize_model(apart, nearest))
    losses = [float((each(token_batch(4, 16)).logits - expected).norm()) for each in models]
    assert losses[0] < losses[1] < 0.15 * float(expected.norm())


@torch.no_grad()
def test_what_another_layer_reads_gets_no_scale_and_the_report_says_why():
    for how in ("a norm of two layers", "the memory of two norms"):
        report = quantize_model(sharing(how), token_recipe(rounding="nearest", clip=False)).hf_quantizer.report
        reasons = {group.producer: group.unscaled for layer in report.layers for group in layer.groups}
        assert SHARED in reasons.values(), how
        assert "input_layernorm" not in reasons


@torch.no_grad()
def test_each_place_is_saved_and_loads(tmp_path):
    model = quantize_model(sharing("two linears of one input"), token_recipe(format="awq"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(loaded(token_batch(2, 8)).logits, model(token_batch(2, 8)).logits)


@pytest.mark.parametrize("how", SHARING)
def test_a_failure_leaves_the_sharing_and_the_values(how):
    model = sharing(how)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # found once the first layer is quantized
    before, shared = copy.deepcopy(model.state_dict()), shared_parameters(model)
    with pytest.raises(NumericalError):
        quantize_model(model, token_recipe())
    assert shared_parameters(model) == shared
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_a_module_of_two_layers_stays_as_it_is_and_the_report_says_why():
    """It reads two inputs. Quantized for one, it would be wrong for the other; it used to end in a KeyError."""
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    quantized = quantize_model(model, token_recipe())
    left_out = quantized.hf_quantizer.report.left_out
    for layer in (FIRST, SECOND):
        assert left_out[f"{layer}.mlp.up_proj"] == "one module of several decoder layers, whose inputs differ"
    assert quantized.model.layers[0].mlp is quantized.model.layers[1].mlp
    assert torch.equal(quantized.model.layers[1].mlp.up_proj.weight, before)
    assert isinstance(quantized.model.layers[1].self_attn.q_proj, QuantizedLinear)


def test_names_of_one_module_within_a_layer_are_not_sharing():
    model = tiny_llama()
    model.model.layers[0].alias = model.model.layers[0].mlp
    assert shared_parameters(model) == {FIRST: set(), SECOND: set()}


def test_linears_that_share_are_told_apart_from_those_that_do_not():
    found = shared_parameters(sharing("two linears of one input"))
    assert found == {FIRST: {"mlp.up_proj.weight", "mlp.gate_proj.weight"}, SECOND: set()}
