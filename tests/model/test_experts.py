"""Tests that unfused experts compute the same as fused ones, are recognized by flags alone, and get original names."""

from __future__ import annotations

import pytest
import torch
from expert_models import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, mixtral, qwen3_moe
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from hf_awq_offload import AwqLinear, AwqOffloadConfig, quantize_model
from hf_awq_offload.model.expert_interface import (
    Projections,
    _chosen_by_expert,
    is_fused_experts,
    original_projections,
    unfused,
)
from hf_awq_offload.model.expert_names import conversions_without_merging
from hf_awq_offload.model.experts import Routing, expert_parts, routed, router_linears


class FlaggedExperts(nn.Module):
    """Fused experts of any layout, computed in the plainest way."""

    def __init__(self, has_gate: bool, has_bias: bool, is_transposed: bool, is_concatenated: bool):
        super().__init__()
        self.has_gate, self.has_bias = has_gate, has_bias
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        generator = torch.Generator().manual_seed(0)
        rows = 2 * INTERMEDIATE if has_gate else INTERMEDIATE
        for name, out_features, in_features in (
            ("gate_up_proj" if has_gate else "up_proj", rows, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            shape = (EXPERTS, in_features, out_features) if is_transposed else (EXPERTS, out_features, in_features)
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) * 0.2))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, out_features, generator=generator)))

    def act_fn(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 0.1 * x

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self._squashed(gate) * up

    def _squashed(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        for token in range(hidden_states.shape[0]):
            for place, expert in enumerate(top_k_index[token].tolist()):
                x = self._product(first, expert, hidden_states[token])
                inner = self._apply_gate(x) if self.has_gate else self.act_fn(x)
                output[token] += self._product("down_proj", expert, inner) * top_k_weights[token, place]
        return output

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y = x @ weight if self.is_transposed else weight @ x
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


def routing(k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(TOKENS)])
    return hidden, index, torch.rand(TOKENS, k, generator=generator)


LAYOUTS = [
    pytest.param(gate, bias, transposed, concatenated, id=f"{gate=} {bias=} {transposed=} {concatenated=}")
    for gate in (True, False)
    for bias in (True, False)
    for transposed in (True, False)
    for concatenated in (True, False)
]


@pytest.mark.parametrize(("gate", "bias", "transposed", "concatenated"), LAYOUTS)
@torch.no_grad()
def test_unfused_experts_of_every_layout_compute_what_the_fused_ones_do(gate, bias, transposed, concatenated):
    fused = FlaggedExperts(gate, bias, transposed, concatenated)
    assert is_fused_experts(fused)
    experts = unfused(fused)
    torch.testing.assert_close(experts(*routing()), fused(*routing()), rtol=1e-4, atol=1e-5)
    linears = [module for module in experts.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == EXPERTS * (3 if gate else 2)
    assert all((linear.bias is not None) == bias for linear in linears)
    assert len(list(fused.parameters())) == (4 if bias else 2), "the fused module is left as it was"


@torch.no_grad()
def test_calibration_can_send_every_token_through_every_expert_without_changing_the_output():
    experts = unfused(FlaggedExperts(True, False, False, True))
    expected, rows = experts(*routing()), []
    experts.get_submodule("3.up_proj").register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    with routed(experts, Routing.EVERY_TOKEN):
        torch.testing.assert_close(experts(*routing()), expected)
    assert rows == [TOKENS]
    with routed(experts, Routing.UNIFORM):
        assert not torch.allclose(experts(*routing()), expected)
    assert experts.routing is Routing.TOP_K


def test_experts_are_taken_apart_without_a_copy_where_their_layout_allows_it():
    fused = FlaggedExperts(True, False, False, True)
    experts = unfused(fused)
    storage = fused.gate_up_proj.untyped_storage().data_ptr()
    assert experts.get_submodule("1.up_proj").weight.untyped_storage().data_ptr() == storage


def test_experts_are_taken_apart_on_the_meta_device():
    with torch.device("meta"):
        experts = unfused(GptOssExperts(GptOssConfig(num_local_experts=EXPERTS, hidden_size=64, intermediate_size=32)))
    assert all(parameter.is_meta for parameter in experts.parameters())
    assert experts.get_submodule("0.gate_proj").weight.shape == (32, 64)


@pytest.mark.parametrize(
    ("build", "names"),
    [(mixtral, Projections("w1", "w3", "w2")), (qwen3_moe, Projections("gate_proj", "up_proj", "down_proj"))],
)
def test_names_are_those_of_the_original_checkpoint_and_merging_is_dropped(build, names):
    model = build()
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    name = "model.layers.0.mlp.experts"
    module = model.get_submodule(name)
    assert original_projections(name, module, conversions) == names
    assert conversions_without_merging(conversions, model) == conversions
    model.set_submodule(name, unfused(module, names))
    assert len(conversions_without_merging(conversions, model)) == len(conversions) - 2


def test_a_router_that_is_a_linear_stands_beside_its_experts():
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.experts = unfused(FlaggedExperts(True, False, False, True))
    block.mlp.gate = nn.Linear(HIDDEN, EXPERTS)
    block.mlp.shared = nn.Linear(HIDDEN, HIDDEN)
    block.attention = nn.Linear(HIDDEN, EXPERTS)
    assert router_linears(block) == {"mlp.gate"}
    assert expert_parts(block)["mlp.experts.2.up_proj"].family == "mlp.experts.*.up_proj"


DATA = [[(7 * row + 3 * i) % 60 for i in range(24)] for row in range(4)]


def recipe(**changes) -> AwqOffloadConfig:
    return AwqOffloadConfig(**{"dataset": DATA, "group_size": 32, "max_seq_len": 24, "n_grid": 3} | changes)


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_checkpoints_hold_experts_one_by_one_under_their_original_names_and_load(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "original")
    model_class = type(model)
    quantized = model_class.from_pretrained(tmp_path / "original", quantization_config=recipe())
    quantized.save_pretrained(tmp_path / "awq")
    from safetensors import safe_open

    with safe_open(tmp_path / "original" / "model.safetensors", "pt") as file:
        original = {name for name in file.keys() if ".experts." in name}  # noqa: SIM118
    with safe_open(tmp_path / "awq" / "model.safetensors", "pt") as file:
        packed = {name for name in file.keys() if ".experts." in name}  # noqa: SIM118
    expected = {name.replace(".weight", f".{part}") for name in original for part in ("qweight", "qzeros", "scales")}
    assert packed == expected
    reloaded, info = model_class.from_pretrained(tmp_path / "awq", output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor(DATA)
    torch.testing.assert_close(reloaded(ids).logits, quantized(ids).logits, rtol=1e-4, atol=1e-5)


def test_every_expert_is_quantized_and_starved_ones_are_named():
    model = quantize_model(mixtral(), recipe(min_expert_tokens=10**6))
    report = model.hf_quantizer.report
    assert set(report.layers[0].starved_experts) == {f"mlp.experts.{expert}" for expert in range(EXPERTS)}
    assert sum(isinstance(module, AwqLinear) for module in model.modules()) == 2 * (4 + 3 * EXPERTS)
    assert not isinstance(model.model.layers[0].mlp.gate, AwqLinear)
    everywhere = quantize_model(mixtral(), recipe(min_expert_tokens=4 * 24, all_experts=True))
    assert everywhere.hf_quantizer.report.layers[0].starved_experts == {}


def test_a_failed_run_puts_fused_experts_back(monkeypatch):
    model = mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(*args, **kwargs):
        raise KeyError("inside")

    monkeypatch.setattr("hf_awq_offload.integrations.quantizer.meta_of_run", fail)
    with pytest.raises(KeyError, match="inside"):
        quantize_model(model, recipe())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_tokens_are_found_by_expert_in_their_order(tokens):
    index = torch.randint(-1, 6, (tokens, 3), generator=torch.Generator().manual_seed(0))  # -1 and 5 name no expert
    found = _chosen_by_expert(index, 5)
    assert len(found) == 5
    for expert, chosen in enumerate(found):
        token, place = torch.where(index == expert)
        assert torch.equal(chosen, token * 3 + place)
