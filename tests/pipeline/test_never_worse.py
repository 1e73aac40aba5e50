"""No group's calibration loss is worse than that of rounding to nearest, whatever the inputs and weights.

On a layer made for it, the loss is computed from its inputs and outputs, in fp64, apart from the package; on whole
models it is the report's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, token_batch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, NumericalError
from hf_awq_offload.calibration.layer_statistics import LayerStatistics
from hf_awq_offload.formats.grid import quantize_dequantize
from hf_awq_offload.model.folds import Fold, InputGroup, LayerStructure, ProducerKind
from hf_awq_offload.nn.quantized_linear import QuantizedLinear
from hf_awq_offload.pipeline.layer_context import LayerContext
from hf_awq_offload.pipeline.layer_quantization import quantize_with_statistics

IN, OUT, GROUP = 64, 24, 32
ROUNDINGS = pytest.mark.parametrize("rounding", ["nearest", "error_feedback"])

RELATIVE_ERROR_OF_FP32 = 1e-5
"""Relative tolerance on squared outputs: the package compares losses in fp32, the test in fp64."""


class Scale(nn.Module):
    """A norm reduced to its weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Block(nn.Module):
    """Two linears behind a norm."""

    def __init__(self, norm: Tensor, *weights: Tensor):
        super().__init__()
        self.norm = Scale(norm)
        self.first, self.second = (self.linear(weight) for weight in weights)

    @staticmethod
    def linear(weight: Tensor) -> nn.Linear:
        linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        return linear

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * self.norm.weight
        return self.first(x), self.second(x)

    @torch.no_grad()
    def exactly(self, x: Tensor) -> Tensor:
        """Returns the block's output in fp64, (tokens, 2 · OUT)."""
        x = x.double() * self.norm.weight.double()
        weights = [
            linear.dequantized(torch.float64) if isinstance(linear, QuantizedLinear) else linear.weight.double()
            for linear in (self.first, self.second)
        ]
        return torch.cat([x @ weight.t() for weight in weights], dim=1)


NAMES = ("first", "second")


def recipe_for(**fields: Any) -> AwqOffloadConfig:
    return AwqOffloadConfig(**{"group_size": GROUP, "n_grid": 5, "format": "compressed-tensors"} | fields)


@torch.no_grad()
def loss_beside_nearest(block: Block, x: Tensor, recipe: AwqOffloadConfig) -> tuple[float, float, float]:
    """Quantizes `block`; returns its loss on x, that of rounding to nearest, and the mean squared output."""
    expected = block.exactly(x)
    nearest = []
    for name in NAMES:
        linear = block.get_submodule(name)
        grid = recipe.grid(f"block.{name}", IN, linear.weight.dtype)
        nearest.append(quantize_dequantize(linear.weight.float(), grid).double())
    scaled = x.double() * block.norm.weight.double()
    rounded = torch.cat([scaled @ weight.t() for weight in nearest], dim=1)
    fold = Fold("norm", ProducerKind.NORM, torch.arange(IN), IN)
    structure = LayerStructure((InputGroup(NAMES, fold),), frozenset())
    context = LayerContext("block", block, frozenset(NAMES), recipe, None)
    statistics = LayerStatistics(block, structure, context.quantizable, torch.device("cpu"))
    with statistics.collecting():
        block(x)
    quantize_with_statistics(context, structure, statistics.gathered("block", 1))
    assert all(isinstance(block.get_submodule(name), QuantizedLinear) for name in NAMES)
    assert all(bool(tensor.isfinite().all()) for tensor in block.state_dict().values())

    def mse(outputs: Tensor) -> float:
        return float((outputs - expected).square().sum(dim=1).mean())

    return mse(block.exactly(x)), mse(rounded), float(expected.square().sum(dim=1).mean())


def assert_never_worse(block: Block, x: Tensor, recipe: AwqOffloadConfig) -> None:
    loss, nearest, signal = loss_beside_nearest(block, x, recipe)
    assert loss <= nearest * (1 + RELATIVE_ERROR_OF_FP32) + signal * RELATIVE_ERROR_OF_FP32**2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_channels(x: Tensor, values: float, *channels: int) -> Tensor:
    x = x.clone()
    x[..., list(channels)] = values
    return x


TOKENS = 50
INPUTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: random(TOKENS, IN),
    "dead channels": lambda: with_channels(random(TOKENS, IN), 0.0, 0, 3, 40),
    "a dead group": lambda: with_channels(random(TOKENS, IN), 0.0, *range(32)),
    "all dead but one": lambda: with_channels(torch.zeros(TOKENS, IN), 1.0, 7),
    "nothing but zeros": lambda: torch.zeros(TOKENS, IN),
    "one huge channel": lambda: with_channels(random(TOKENS, IN), 1e4, 5),
    "one huge channel of mixed signs": lambda: random(TOKENS, IN) * with_channels(torch.ones(IN), 1e4, 5),
    "one tiny channel": lambda: random(TOKENS, IN) * with_channels(torch.ones(IN), 1e-6, 5),
    "constant": lambda: torch.full((TOKENS, IN), 0.7),
    "one vector again and again": lambda: random(1, IN).expand(TOKENS, IN),
    "one token": lambda: random(1, IN),
    "two tokens": lambda: random(2, IN),
    "opposite channels": lambda: random(TOKENS, 1) * torch.tensor([1.0, -1.0]).repeat(IN // 2),
    "small": lambda: random(TOKENS, IN) * 1e-4,
    "large": lambda: random(TOKENS, IN) * 1e4,
    "denormal": lambda: random(TOKENS, IN) * 1e-40,
    "squares that are denormal": lambda: random(TOKENS, IN) * 1e-21,
    "squares near the end of fp32": lambda: random(TOKENS, IN) * 1e17,
    "one outlying token": lambda: torch.cat([random(TOKENS, IN), random(1, IN, seed=1) * 1e3]),
}
WEIGHTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": lambda: (random(OUT, IN, seed=2) * 0.1, random(OUT, IN, seed=3) * 0.1),
    "zeros": lambda: (torch.zeros(OUT, IN), random(OUT, IN, seed=3) * 0.1),
    "zeros only": lambda: (torch.zeros(OUT, IN), torch.zeros(OUT, IN)),
    "a group of zeros": lambda: (with_channels(random(OUT, IN, seed=2), 0.0, *range(32)), random(OUT, IN, seed=3)),
    "constant": lambda: (torch.full((OUT, IN), 0.3), torch.full((OUT, IN), -0.3)),
    "one huge column": lambda: (random(OUT, IN, seed=2) * 0.1, with_channels(random(OUT, IN, seed=3) * 0.1, 50.0, 9)),
    "tiny": lambda: (random(OUT, IN, seed=2) * 1e-5, random(OUT, IN, seed=3) * 1e-5),
    "denormal": lambda: (random(OUT, IN, seed=2) * 1e-40, random(OUT, IN, seed=3)),
    "single outliers": lambda: (with_channels(random(OUT, IN, seed=2), 1e4, 9), random(OUT, IN, seed=3) * 1e-4),
    "far from zero": lambda: (random(OUT, IN, seed=2) * 0.01 + 3, random(OUT, IN, seed=3)),
}


@ROUNDINGS
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_on_every_pair_of_odd_inputs_and_odd_weights(inputs, weights, rounding):
    for bits, zero_point in itertools.product((3, 4), (True, False)):
        block = Block(torch.rand(IN, generator=torch.Generator().manual_seed(4)) + 0.5, *WEIGHTS[weights]())
        assert_never_worse(block, INPUTS[inputs](), recipe_for(bits=bits, zero_point=zero_point, rounding=rounding))


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    zero_point=st.booleans(),
    rounding=st.sampled_from(["nearest", "error_feedback"]),
    clip=st.booleans(),
    duo_scaling=st.booleans(),
    group_size=st.sampled_from([-1, 32]),
    tokens=st.integers(1, 80),
    rank=st.integers(1, IN),
    spread=st.floats(0, 6),
    dead=st.sets(st.integers(0, IN - 1), max_size=IN - 1),
    seed=st.integers(0, 1000),
)
def test_on_inputs_of_any_rank_and_spread(
    bits, zero_point, rounding, clip, duo_scaling, group_size, tokens, rank, spread, dead, seed
):
    x = random(tokens, rank, seed=seed) @ random(rank, IN, seed=seed + 1)
    x = with_channels(x * torch.exp(spread * random(IN, seed=seed + 2)), 0.0, *dead)
    block = Block(random(IN, seed=seed + 3), random(OUT, IN, seed=seed + 4), random(OUT, IN, seed=seed + 5) * 0.01)
    fields = {"bits": bits, "zero_point": zero_point, "clip": clip, "duo_scaling": duo_scaling}
    assert_never_worse(block, x, recipe_for(rounding=rounding, group_size=group_size, **fields))


@ROUNDINGS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_linears_of_one_input_with_grids_of_their_own(dtype, rounding):
    weights = [weight.to(dtype) for weight in WEIGHTS["random"]()]
    block = Block(torch.ones(IN, dtype=dtype), *weights)
    overrides = {"second": {"bits": 8, "group_size": -1, "zero_point": False}}
    x = INPUTS["one huge channel of mixed signs"]().to(dtype)
    assert_never_worse(block, x, recipe_for(bits=2, rounding=rounding, overrides=overrides))


@ROUNDINGS
def test_a_scale_that_overflows_the_norm_is_not_taken(rounding):
    """Quiet channel 5 would be divided by less than 1; its norm weight is all but the largest number of fp16."""
    loud = with_channels(torch.ones(IN), 30.0, 0, 33, 50)
    x = random(TOKENS, IN) * with_channels(loud, 1e-6, 5)

    def block_of(dtype: torch.dtype) -> Block:
        return Block(with_channels(torch.ones(IN), 6e4, 5).to(dtype), *(each.to(dtype) for each in WEIGHTS["random"]()))

    recipe = recipe_for(bits=3, rounding=rounding, duo_scaling=False)
    wide, narrow = block_of(torch.float32), block_of(torch.float16)
    assert_never_worse(wide, x, recipe)
    assert float(wide.norm.weight.detach().abs().max()) > torch.finfo(torch.float16).max
    assert_never_worse(narrow, x.half(), recipe)
    assert bool(narrow.norm.weight.isfinite().all())


# -- whole models --------------------------------------------------------------------------------------------------


def model_recipe(**fields: Any) -> AwqOffloadConfig:
    data = {"dataset": token_batch(4, 24), "n_samples": 4, "max_seq_len": 24}
    return AwqOffloadConfig(**{"group_size": 32, "n_grid": 5} | data | fields)


def change_model(change: Callable[[nn.Module], object]) -> PreTrainedModel:
    model = tiny_llama()
    with torch.no_grad():
        change(model.model)
    return model


def scale_norms(decoder: Any, factor: float, channel: int) -> None:
    for layer in decoder.layers:
        layer.input_layernorm.weight[channel] *= factor
        layer.post_attention_layernorm.weight[channel] *= factor


def dead_channels(decoder: Any) -> None:
    for layer in decoder.layers:
        layer.input_layernorm.weight[::3] = 0
        layer.post_attention_layernorm.weight[1] = 0


MODELS: dict[str, Callable[[Any], object]] = {
    "dead channels": dead_channels,
    "dead embeddings": lambda decoder: decoder.embed_tokens.weight[:, :40].zero_(),
    "one huge channel": lambda decoder: scale_norms(decoder, 1e4, 5),
    "one tiny channel": lambda decoder: scale_norms(decoder, 1e-6, 5),
    "zero weights": lambda decoder: [layer.mlp.up_proj.weight.zero_() for layer in decoder.layers],
    "zero values": lambda decoder: decoder.layers[0].self_attn.v_proj.weight.zero_(),
    "constant input": lambda decoder: decoder.embed_tokens.weight.fill_(0.5),
}


def from_pretrained(model: PreTrainedModel, directory: Path, recipe: AwqOffloadConfig) -> PreTrainedModel:
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=recipe, dtype="auto")


def assert_report_never_worse(model: PreTrainedModel) -> None:
    groups = [(layer.name, group) for layer in model.hf_quantizer.report.layers for group in layer.groups]
    assert len(groups) == 8
    for name, group in groups:
        assert group.loss <= group.loss_nearest * (1 + RELATIVE_ERROR_OF_FP32), (name, group)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    assert bool(model(token_batch(1, 8)).logits.isfinite().all())


@ROUNDINGS
@pytest.mark.parametrize("change", MODELS)
@pytest.mark.parametrize("bits", [2, 4])
def test_odd_models_from_pretrained(change, bits, rounding, tmp_path):
    recipe = model_recipe(bits=bits, rounding=rounding)
    assert_report_never_worse(from_pretrained(change_model(MODELS[change]), tmp_path, recipe))


@ROUNDINGS
@pytest.mark.parametrize(
    "tokens",
    [torch.full((3, 24), 7), token_batch(1, 8), torch.full((1, 8), 7)],
    ids=["one word", "one sequence", "both"],
)
def test_data_of_little_variety(tokens, rounding, tmp_path):
    recipe = model_recipe(dataset=tokens, max_seq_len=tokens.shape[1], rounding=rounding)
    assert_report_never_worse(from_pretrained(tiny_llama(), tmp_path, recipe))


@ROUNDINGS
def test_a_norm_at_the_end_of_fp16(rounding, tmp_path):
    def change(decoder: Any) -> None:
        for layer in decoder.layers:
            layer.input_layernorm.weight[5] = 6e4
            layer.self_attn.q_proj.weight[:, 5] = layer.self_attn.k_proj.weight[:, 5] = 0
            layer.self_attn.v_proj.weight[:, 5] *= 1e-4
        decoder.embed_tokens.weight[:, 5] *= 1e-4

    assert_report_never_worse(from_pretrained(change_model(change).half(), tmp_path, model_recipe(rounding=rounding)))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
@ROUNDINGS
def test_activations_that_are_not_finite_name_their_layer(value, rounding, tmp_path):
    """1e30 is a finite weight, whose activations are not."""

    def change(decoder: Any) -> None:
        decoder.layers[1].mlp.gate_proj.weight[3] = value
        decoder.layers[1].mlp.up_proj.weight[3] = value

    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.(down|gate|up)_proj"):
        from_pretrained(change_model(change), tmp_path, model_recipe(rounding=rounding))
