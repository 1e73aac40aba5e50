"""Tests that experts without transformers' interface are quantized, however their module computes with them."""

from __future__ import annotations

import pytest
import torch
from expert_models import EXPERTS, HIDDEN, WITHOUT_INTERFACE, dbrx, jetmoe, llama4, longcat_flash, saved
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_awq_offload import AwqLinear, AwqOffloadConfig, quantize, quantize_model
from hf_awq_offload.logs import get_logger
from hf_awq_offload.model.experts import expert_parts

DATA = [[(7 * row + 3 * i + i * i) % 60 for i in range(24)] for row in range(4)]
TOKENS = 4 * 24


def recipe(**changes) -> AwqOffloadConfig:
    return AwqOffloadConfig(**{"dataset": DATA, "group_size": 32, "max_seq_len": 24, "n_grid": 2} | changes)


def divergence(original: Tensor, quantized: Tensor) -> float:
    """Returns the KL divergence of next-token distributions, in nats per token."""
    expected, other = original.float().log_softmax(-1), quantized.float().log_softmax(-1)
    return float((expected.exp() * (expected - other)).sum(-1).mean())


@pytest.fixture
def warnings_said(monkeypatch) -> list[str]:
    said: list[str] = []
    logger = get_logger("hf_awq_offload.integrations.dense_share")
    monkeypatch.setattr(logger, "warning", said.append)
    return said


@pytest.mark.parametrize("build", WITHOUT_INTERFACE)
@torch.no_grad()
def test_both_ways_to_quantize_write_small_checkpoints_that_load(build, tmp_path, warnings_said):
    original = build()
    saved(original, tmp_path / "original")
    report = quantize(tmp_path / "original", tmp_path / "streamed", recipe())
    model_class = type(original)
    quantized = model_class.from_pretrained(tmp_path / "original", quantization_config=recipe(), dtype="auto")
    quantized.save_pretrained(tmp_path / "loaded")
    files = [tmp_path / name / "model.safetensors" for name in ("original", "streamed", "loaded")]
    streamed, loaded = load_file(files[1]), load_file(files[2])
    assert streamed.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in streamed.items())
    layers = [type(model).__name__ for model in quantized.modules() if isinstance(model, nn.Linear)]
    assert layers.count("AwqLinear") > 0.8 * len(layers)
    assert all(isinstance(quantized.get_submodule(name), AwqLinear) for name in expert_parts(quantized))
    assert not [name for name in report.left_out if "expert" in name and "router" not in name]
    embeddings = 2 * 2 * 64 * HIDDEN
    assert files[1].stat().st_size - embeddings < 0.42 * (files[0].stat().st_size - embeddings)
    ids = torch.tensor(DATA)
    assert 0 < divergence(original(ids).logits, quantized(ids).logits) < 0.1
    reloaded, info = model_class.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(reloaded(ids).logits, quantized(ids).logits)
    assert warnings_said == []


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (
            llama4,
            ("model.layers.1.feed_forward.experts.3.gate_proj", "model.layers.0.feed_forward.experts.0.down_proj"),
        ),
        (dbrx, ("transformer.blocks.1.ffn.experts.3.w1", "transformer.blocks.0.ffn.experts.0.v1")),
        (jetmoe, ("model.layers.1.mlp.input_linear.3", "model.layers.0.self_attention.experts.output_linear.0")),
        (longcat_flash, ("model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts.5.gate_proj")),
    ],
)
def test_linears_have_the_names_that_others_give_them(build, names):
    quantized = quantize_model(build(), recipe())
    assert all(isinstance(quantized.get_submodule(name), AwqLinear) for name in names)


@pytest.mark.parametrize("build", WITHOUT_INTERFACE)
def test_what_feeds_the_last_projection_of_an_expert_absorbs_its_scale(build):
    report = quantize_model(build(), recipe()).hf_quantizer.report
    last = ("down_proj", "w2", "mlp.output_linear")
    groups = [group for group in report.layers[0].groups if any(name in group.consumers[0] for name in last)]
    of_experts = [group for group in groups if group.consumers[0].startswith(("mlp.", "ffn.", "feed_forward.experts"))]
    assert len(of_experts) == EXPERTS
    assert all(group.producer and group.producer.startswith(group.consumers[0][:4]) for group in of_experts)


@pytest.mark.parametrize(
    ("build", "norm"),
    [(llama4, "post_attention_layernorm"), (dbrx, "norm_attn_norm.norm_2"), (jetmoe, "post_attention_layernorm")],
)
def test_the_norm_before_the_experts_absorbs_their_scale(build, norm):
    """Those of Llama 4 read their input times the router's score, those of JetMoe rows that were sorted."""
    report = quantize_model(build(), recipe()).hf_quantizer.report
    (group,) = [group for group in report.layers[0].groups if group.producer == norm]
    names = ("gate_proj", "w1", "mlp.input_linear")
    assert sum("xpert" in name or "mlp.input" in name for name in group.consumers if any(n in name for n in names)) >= 4


@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    model = quantize_model(llama4(), recipe())
    ids = torch.tensor(DATA)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("build", [llama4, dbrx, jetmoe, longcat_flash])
def test_starved_experts_are_named_and_all_experts_reaches_every_one(build):
    active = 1 if build is llama4 else 2
    report = quantize_model(build(), recipe(min_expert_tokens=10**6)).hf_quantizer.report
    seen = report.layers[0].starved_experts
    mixtures = {name.rpartition(".")[0] for name in seen}
    for mixture in mixtures:
        tokens = [count for name, count in seen.items() if name.rpartition(".")[0] == mixture]
        assert 0 < sum(tokens) <= active * TOKENS, "tokens that an expert does not compute do not count"
        assert build is longcat_flash or sum(tokens) == active * TOKENS
    everywhere = quantize_model(build(), recipe(min_expert_tokens=TOKENS, all_experts=True)).hf_quantizer.report
    assert not everywhere.layers[0].starved_experts


class UnprovableExperts(nn.Module):
    """Multiplies by the squares of its weights, so that no linear has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * HIDDEN) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN) * 0.2)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            weight = (top_k_weights * (top_k_index == expert)).sum(dim=-1, keepdim=True)
            inner = torch.relu(hidden_states @ self.up[expert].square())
            output += (inner @ self.down[expert].square()) * weight
        return output


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, HIDDEN)
        weights, index = self.gate(rows).softmax(-1).topk(2)
        return self.experts(rows, index, weights).view_as(hidden_states)


def llama_with(experts: type[nn.Module]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp = Mixture(experts())
    return model


@torch.no_grad()
def test_experts_that_no_linear_replaces_stay_dense_and_one_warning_says_so_before_the_first_layer(
    warnings_said, monkeypatch
):
    model = llama_with(UnprovableExperts)
    before = model.model.layers[1].mlp.experts.up.clone()
    said_by_then = []

    def note(*args, **kwargs):
        said_by_then.extend(warnings_said)
        return quantize_layers(*args, **kwargs)

    from hf_awq_offload.integrations.quantizer import quantize_layers

    monkeypatch.setattr("hf_awq_offload.integrations.quantizer.quantize_layers", note)
    report = quantize_model(model, recipe()).hf_quantizer.report
    assert said_by_then == warnings_said
    (message,) = warnings_said
    for part in (
        "% of the decoder layers' weights",
        "model.layers.*.mlp.experts (a UnprovableExperts",
        "up is used by",
    ):
        assert part in message
    assert torch.equal(model.model.layers[1].mlp.experts.up, before)
    assert isinstance(model.model.layers[1].self_attn.q_proj, AwqLinear)
    assert "up is used by square" in report.left_out["model.layers.1.mlp.experts"]


def test_nobody_is_warned_of_what_they_have_named(warnings_said):
    quantize_model(llama_with(UnprovableExperts), recipe(modules_to_not_convert=["experts"]))
    assert warnings_said == []
