"""Probing holds a parameter at a time beside the layer's weights, as much as `probing_bytes` says, and seldom waits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import tiny_llama
from simulated_gpu import observed
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from hf_awq_offload.calibration.skeleton import record_skeleton
from hf_awq_offload.model.decoder_layers import ProbeCalls, candidate_layers
from hf_awq_offload.model.fold_probing import discover_structure, without_refuted_folds
from hf_awq_offload.model.fused_experts import take_experts_apart
from hf_awq_offload.model.probe_memory import PROBE_TOKENS, probing_bytes
from hf_awq_offload.model.probe_runner import ProbeRunner

GPU = torch.device("cuda:0")
TOLERANCE = 0.15
SMALL = {"vocab_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
CONFIGS = {
    "dense": LlamaConfig(hidden_size=512, intermediate_size=1408, num_key_value_heads=2, **SMALL),
    "wide": LlamaConfig(hidden_size=1024, intermediate_size=2816, num_key_value_heads=8, **SMALL),
    "fused qkv": GPTNeoXConfig(hidden_size=512, intermediate_size=2048, **SMALL),
}


def moe(experts: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=96, num_experts=experts, num_experts_per_tok=4, num_key_value_heads=2,
        head_dim=64, decoder_sparse_step=1, mlp_only_layers=[], **SMALL,
    )  # fmt: skip


def built(config: PreTrainedConfig, takes_apart: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.config._experts_implementation = "eager"  # the other one counts tokens with an operator the CPU lacks
    if takes_apart:
        take_experts_apart(model, all_kinds=True)
    return model


def first_layer(model: PreTrainedModel) -> tuple[nn.Module, ProbeCalls]:
    """Returns the model's first decoder layer, on the GPU, and calls to probe it on."""
    name, layer = next(iter(candidate_layers(model).items()))
    ids = torch.randint(3, 60, (1, PROBE_TOKENS))
    skeleton = record_skeleton(model, [ids, ids[:, :1]])
    several, single = (
        (call, hidden) for call, hidden in zip(skeleton.calls[name].values(), skeleton.hidden, strict=True)
    )
    return layer.to(GPU), ProbeCalls(several, single)


@contextmanager
def peak_beside_the_weights(found: list[int]) -> Iterator[None]:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    yield
    found.append(torch.cuda.max_memory_allocated() - held)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_peak_is_what_the_formula_says(config):
    layer, probes = first_layer(built(config))
    peaks: list[int] = []
    with peak_beside_the_weights(peaks):
        discover_structure(layer, probes, GPU, seed=0)
    assert (1 - TOLERANCE) * probing_bytes(layer) <= peaks[0] <= probing_bytes(layer)


@pytest.mark.parametrize("experts", [8, 32])
def test_with_experts_too_beside_their_weights(experts):
    """The formula does not know that attention's weights are cast before the experts' inputs exist."""
    layer, probes = first_layer(built(moe(experts)))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    peaks: list[int] = []
    with peak_beside_the_weights(peaks):
        discover_structure(layer, probes, GPU, seed=0)
    assert peaks[0] <= probing_bytes(layer) <= peaks[0] + TOLERANCE * (weights + peaks[0])


def test_experts_yet_to_be_taken_apart_are_planned_for_as_if_they_were():
    with torch.device("meta"):
        fused, apart = (built(moe(32), takes_apart) for takes_apart in (False, True))
    expected = probing_bytes(apart.model.layers[0])
    assert probing_bytes(fused.model.layers[0]) == expected
    assert probing_bytes(fused.model.layers[0], takes_apart=False) > 3 * expected


def test_experts_that_stay_fused_are_cast_one_by_one():
    layer, probes = first_layer(built(moe(32), takes_apart=False))
    stack_bytes = 4 * max(parameter.numel() for parameter in layer.parameters())
    peaks: list[int] = []
    with peak_beside_the_weights(peaks):
        discover_structure(layer, probes, GPU, seed=0)
    assert peaks[0] < stack_bytes / 4
    assert peaks[0] <= probing_bytes(layer, takes_apart=False)


def test_proving_a_known_structure_takes_no_more():
    layer, probes = first_layer(built(CONFIGS["dense"]))
    structure = discover_structure(layer, probes, GPU, seed=0)
    peaks: list[int] = []
    with peak_beside_the_weights(peaks):
        without_refuted_folds(layer, structure, probes, GPU, seed=0)
    assert peaks[0] <= probing_bytes(layer)


def waits(model: PreTrainedModel) -> tuple[int, int]:
    """Returns how often the host waits while a layer is probed, and how often the layer runs for it."""
    layer, probes = first_layer(model)
    runs = 0
    observe = ProbeRunner.observe

    def counting(*args, **kwargs):
        nonlocal runs
        runs += 1
        return observe(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeRunner, "observe", counting)
        observed.reset_counters()
        discover_structure(layer, probes, GPU, seed=0)
    return observed.counters()["synchronizations"], runs


def test_the_host_reads_a_probes_result_at_once():
    """Each probe sends its factors and reads its result; the calls and the first inputs are moved beside that."""
    number, runs = waits(tiny_llama().to(torch.bfloat16))
    assert number <= 2 * runs
