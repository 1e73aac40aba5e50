"""Whole models with numbers that break arithmetic: the result is finite and no worse than rounding to nearest, or an
error of the package's own says which tensor it is and what to change.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama, token_batch, token_recipe
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, CalibrationDataError, ModelStructureError, NumericalError, quantize_model

FP32_ERROR = 1e-5
"""Relative tolerance on losses, which are sums in fp32."""

Change = Callable[[Any], object]


def made(change: Change, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    model = tiny_llama(**config).to(dtype)
    with torch.no_grad():
        change(model)
    return model


def weight(name: str, change: Callable[[torch.Tensor], object]) -> Change:
    return lambda model: change(model.get_parameter(f"model.layers.{name}.weight"))


def fill(name: str, value: float) -> Change:
    """Sets one weight."""
    return weight(name, lambda tensor: tensor.view(-1)[5:6].fill_(value))


def outliers(model: Any) -> None:
    """Channels and single weights of 1e4, in both layers."""
    for layer in model.model.layers:
        layer.input_layernorm.weight[7] = 1e4
        layer.post_attention_layernorm.weight[9] = -1e4
        for linear in (layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            linear.weight[3, 5] = 1e4


def zeros(*names: str) -> Change:
    return lambda model: [model.get_parameter(f"model.layers.{name}.weight").zero_() for name in names]


def every_linear(change: Callable[[torch.Tensor], object]) -> Change:
    return lambda model: [change(part.weight) for part in model.model.modules() if isinstance(part, nn.Linear)]


SOUND: dict[str, tuple[Change, dict[str, Any]]] = {
    "outliers": (outliers, {}),
    "denormal weights": (weight("0.mlp.gate_proj", lambda tensor: tensor[:8].mul_(1e-38)), {}),
    "a layer of zeros": (lambda model: [part.zero_() for part in model.model.layers[0].parameters()], {}),
    "zero linears": (zeros("0.mlp.up_proj", "1.self_attn.v_proj", "1.self_attn.o_proj"), {}),
    "zero groups": (every_linear(lambda tensor: tensor[:, :32].zero_()), {}),
    "zero rows": (every_linear(lambda tensor: tensor[::3].zero_()), {}),
    "constant weights": (every_linear(lambda tensor: tensor.fill_(0.02)), {}),
    "constant inputs": (lambda model: model.model.embed_tokens.weight.fill_(0.3), {}),
    "zero inputs": (lambda model: model.model.embed_tokens.weight.zero_(), {}),
    "denormal inputs": (lambda model: model.model.embed_tokens.weight.mul_(1e-38), {}),
    "huge inputs": (lambda model: model.model.embed_tokens.weight.mul_(1e15), {}),
    "squares of activations that are denormal": (weight("0.input_layernorm", lambda tensor: tensor.mul_(1e-21)), {}),
    "squares of activations near the end": (weight("0.post_attention_layernorm", lambda tensor: tensor.mul_(1e8)), {}),
    "one decoder layer": (lambda model: None, {"num_hidden_layers": 1}),
    "tied embeddings": (lambda model: None, {"tie_word_embeddings": True}),
    "one row that uses the whole of fp16's scales": (
        weight("1.mlp.down_proj", lambda tensor: tensor.view(-1)[5:6].fill_(9e4)),
        {},
    ),
}
RECIPES = {
    "AWQ": {"format": "awq"},
    "compressed-tensors": {"format": "compressed-tensors", "bits": 8, "rounding": "nearest", "zero_point": False},
}


def assert_sound(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Asserts that losses are no worse than nearest and all is finite, also once saved and loaded; returns that."""
    groups = [group for layer in model.hf_quantizer.report.layers for group in layer.groups]
    assert groups
    assert all(group.loss <= group.loss_nearest * (1 + FP32_ERROR) for group in groups)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    logits = loaded(token_batch(2, 12)).logits
    assert bool(logits.isfinite().all())
    assert torch.equal(logits, model(token_batch(2, 12)).logits)
    return loaded


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("case", SOUND)
@torch.no_grad()
def test_odd_numbers_give_a_finite_model_no_worse_than_nearest(case, kind, tmp_path):
    change, config = SOUND[case]
    model = made(change, **config)
    expected = model(token_batch(2, 12)).logits
    quantized = quantize_model(model, token_recipe(**RECIPES[kind]))
    logits = assert_sound(quantized, tmp_path)(token_batch(2, 12)).logits
    if kind == "compressed-tensors":  # 8 bits: close to the model in full precision, whatever its numbers
        assert float((logits - expected).norm()) <= 0.06 * float(expected.norm())


GRIDS = list(itertools.product((2, 3, 4, 8), (True, False), ("nearest", "error_feedback"), ("compressed-tensors",)))
GRIDS += [(4, True, rounding, "awq") for rounding in ("nearest", "error_feedback")]


@pytest.mark.parametrize(("bits", "zero_point", "rounding", "kind"), GRIDS)
@torch.no_grad()
def test_outliers_on_every_grid(bits, zero_point, rounding, kind, tmp_path):
    recipe = token_recipe(bits=bits, zero_point=zero_point, rounding=rounding, format=kind)
    assert_sound(quantize_model(made(outliers), recipe), tmp_path)


# -- errors --------------------------------------------------------------------------------------------------------

LINEAR = "0.mlp.gate_proj"
FAULTS: dict[str, tuple[Change, torch.dtype, str]] = {
    "NaN in a weight": (
        fill(LINEAR, float("nan")),
        torch.float32,
        r"weight of model\.layers\.0\.mlp\.gate_proj holds NaN or infinite .* expected finite .* Repair the checkpoint",
    ),
    "an infinite weight": (
        fill("1.self_attn.q_proj", float("-inf")),
        torch.bfloat16,
        r"weight of model\.layers\.1\.self_attn\.q_proj holds NaN or infinite",
    ),
    "NaN in a norm": (
        fill("1.input_layernorm", float("nan")),
        torch.float32,
        r"model\.layers\.1\.input_layernorm\.weight holds NaN; expected numbers.* Repair the checkpoint",
    ),
    "a weight beyond the largest scale": (
        fill("1.mlp.down_proj", 3e6),
        torch.bfloat16,
        r"model\.layers\.1\.mlp\.down_proj reaches 2\.9\d+e\+06; expected weights that 4 bits can span with a scale of "
        r"at most 65504.* use more bits, or name the module in modules_to_not_convert",
    ),
    "a weight that is infinite in fp16 once rounded": (
        fill("0.mlp.down_proj", 65504.0),
        torch.float16,
        r"model\.layers\.0\.mlp\.down_proj reaches 6\.55e\+04; once quantized to 4 bits, .* infinite in torch\.float16",
    ),
    "an infinite norm": (
        fill("0.post_attention_layernorm", float("inf")),
        torch.float32,
        r"input of model\.layers\.0\.mlp\.(gate|up)_proj holds NaN or infinite values",
    ),
    "activations whose squares are infinite": (
        weight("1.post_attention_layernorm", lambda tensor: tensor.mul_(1e25)),
        torch.float32,
        r"input of model\.layers\.1\.mlp\.(gate|up)_proj holds .*whose squares are infinite in fp32, first on",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.no_grad()
def test_what_cannot_be_quantized_is_named_and_the_model_stays_as_it_was(fault):
    change, dtype, message = FAULTS[fault]
    model = made(change, dtype)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match=message):
        quantize_model(model, token_recipe(format="awq"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("changes", [{"n_grid": 0, "clip": False, "rounding": "nearest"}, {}], ids=["no data", "data"])
def test_a_weight_beyond_the_largest_scale_is_never_cut_off(changes):
    """It used to be: the largest weights came out a hundred times smaller, without a word."""
    with pytest.raises(NumericalError, match="the largest that is stored"):
        quantize_model(made(fill("0.self_attn.o_proj", 1e30)), token_recipe(**changes))


@torch.no_grad()
def test_more_bits_or_leaving_it_out_is_what_helps_against_a_large_weight(tmp_path):
    """Does what the message says."""
    change = fill("0.self_attn.o_proj", 3e6)
    quantize_model(made(change), token_recipe(bits=8, zero_point=False, format="compressed-tensors"))
    left_out = quantize_model(made(change), token_recipe(modules_to_not_convert=["o_proj"]))
    assert float(left_out.model.layers[0].self_attn.o_proj.weight.max()) == 3e6


@torch.no_grad()
def test_linears_that_stay_in_full_precision_may_hold_anything():
    model = made(fill("1.mlp.down_proj", float("inf")))
    quantized = quantize_model(model, token_recipe(modules_to_not_convert=["layers.1.mlp.down_proj"]))
    assert float(quantized.model.layers[1].mlp.down_proj.weight.max()) == float("inf")


def test_weights_too_small_for_any_scale_are_told_of(caplog):
    model = made(weight("1.self_attn.v_proj", lambda tensor: tensor.mul_(1e-7)))
    with caplog.at_level("WARNING", logger="transformers"):
        quantize_model(model, token_recipe())
    (message,) = [record.getMessage() for record in caplog.records if "too small" in record.getMessage()]
    assert "All weights of model.layers.1.self_attn.v_proj are below 1e-05" in message
    assert "modules_to_not_convert" in message


# -- which data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [16, 64])
def test_the_sequence_that_brings_a_bad_activation_is_named(batch_tokens):
    data = token_batch(6, 16).remainder(50).add(3)
    data[4, 9] = 60
    model = made(lambda model: model.model.embed_tokens.weight[60].fill_(float("nan")))
    recipe = token_recipe(dataset=data.tolist(), max_seq_len=16, batch_tokens=batch_tokens)
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.\w_proj .* first on calibration sequence 4 \("):
        quantize_model(model, recipe)


def test_it_is_named_among_sequences_of_other_lengths_and_masks():
    """Micro-batches are cut longest first, so the number is not that of the batch."""
    rows = [{"input_ids": [5] * n, "loss_mask": [0] + [1] * (n - 1)} for n in (9, 20, 14, 20, 14, 9)]
    rows[2] = {"input_ids": [5] * 13 + [60], "loss_mask": [0] + [1] * 13}
    model = made(lambda model: model.model.embed_tokens.weight[60].fill_(float("inf")))
    with pytest.raises(NumericalError, match="first on calibration sequence 2 "):
        quantize_model(model, token_recipe(dataset=rows, batch_tokens=64))


# -- shapes --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_groups_of_the_whole_row_fit_any_width(tmp_path):
    assert_sound(quantize_model(tiny_llama(), token_recipe(group_size=-1)), tmp_path)


def test_groups_larger_than_every_input_are_refused_with_a_remedy():
    with pytest.raises(ModelStructureError, match=r"multiple of the group size 128.*Try another group_size"):
        quantize_model(tiny_llama(), token_recipe(group_size=128))


@torch.no_grad()
def test_a_width_that_the_group_size_does_not_divide_stays_and_is_reported(tmp_path):
    """64 is the width of all inputs but that of down_proj, 96."""
    model = quantize_model(tiny_llama(), token_recipe(group_size=64))
    left_out = model.hf_quantizer.report.left_out
    assert "not a multiple of the group size 64" in left_out["model.layers.0.mlp.down_proj"]
    assert_sound(model, tmp_path)


@pytest.mark.parametrize("dataset", [[[5]], [[5], [6]]], ids=["one token", "two sequences of one"])
def test_a_single_token_is_refused_before_anything_is_done(dataset):
    with pytest.raises(CalibrationDataError, match="usable tokens"):
        quantize_model(tiny_llama(), AwqOffloadConfig(dataset=dataset, group_size=32))


@torch.no_grad()
def test_one_counted_token_is_enough(tmp_path):
    rows = [{"input_ids": list(range(3, 19)), "loss_mask": [0] * 15 + [1]}]
    assert_sound(quantize_model(tiny_llama(), token_recipe(dataset=rows)), tmp_path)
