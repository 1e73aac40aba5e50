"""Tests that fused experts are taken apart by what their forward computes, proven on a twin, and refused otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_awq_offload.errors import ModelStructureError
from hf_awq_offload.model import expert_layouts
from hf_awq_offload.model.expert_layouts import Refusal, layout_of
from hf_awq_offload.model.experts import Routing, routed
from hf_awq_offload.model.fused_experts import fused_experts
from hf_awq_offload.model.replayed_experts import ProductLayout, replayed
from hf_awq_offload.pipeline.left_out import matrices_left_out

EXPERTS, HIDDEN, INNER, TOKENS = 5, 32, 48, 9


class Stacked(nn.Module):
    """Holds experts without a gate, (in, out) each, as remote code may; subclasses compute with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * 0.2)


class TokenByToken(Stacked):
    def forward(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows = []
        for x, of_token, experts in zip(hidden, weights, chosen, strict=True):
            outputs = [
                self.down[e].T @ torch.relu(self.up[int(e)].T @ x) * w for e, w in zip(experts, of_token, strict=True)
            ]
            rows.append(torch.stack(outputs).sum(dim=0))
        return torch.stack(rows)


class AllScores(Stacked):
    """Takes a score for every expert, of which only those of the chosen ones count."""

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in router_indices.unique():
            token = (router_indices == expert).any(dim=-1).nonzero().squeeze(1)
            y = torch.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
            output.index_add_(0, token, y * routing_weights[token, expert, None])
        return output


class Einsum(Stacked):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights = torch.zeros(len(hidden_states), EXPERTS).scatter_add(1, top_k_index, top_k_weights)
        inner = torch.relu(torch.einsum("th,ehi->tei", hidden_states, self.up))
        return torch.einsum("tei,eih->teh", inner, self.down).mul(weights.unsqueeze(-1)).sum(dim=1)


class WithBiases(Stacked):
    """Adds biases per expert, which stay parameters of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER))
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            inner = torch.relu(torch.addmm(self.up_bias[expert], hidden_states[token], self.up[expert]))
            y = inner @ self.down[expert] + self.down_bias[expert]
            output.index_add_(0, token, y * top_k_weights[token, place, None])
        return output


class NotAWeightedSum(Stacked):
    """Normalizes the weights by their largest, so more experts per token would change the output."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k_weights = top_k_weights / (1 + top_k_index.shape[1])
        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            y = torch.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
            output.index_add_(0, token, y * top_k_weights[token, place, None])
        return output


class HalvesOfASlice(Stacked):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states @ self.up[0][:, : INNER // 2]
        return torch.relu(x) @ self.down[0][: INNER // 2]


class UnknownArguments(Stacked):
    def forward(self, hidden_states: Tensor, plan: dict[int, Tensor], capacity: int, scale: float) -> Tensor:
        return hidden_states


class HoldsItsRouter(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Writes(Stacked):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.relu(hidden_states @ self.up[0].mul_(1.0)) @ self.down[0].mul_(1.0)


def arguments(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, EXPERTS if isinstance(module, AllScores) else 2, generator=generator)
    return (hidden, weights, index) if isinstance(module, TokenByToken) else (hidden, index, weights)


PROVABLE = [TokenByToken, AllScores, Einsum, WithBiases]


@pytest.mark.parametrize("module_class", PROVABLE)
@torch.no_grad()
def test_experts_taken_apart_compute_what_the_fused_ones_do_whatever_the_loop(module_class):
    module = module_class()
    layout = layout_of(module)
    assert isinstance(layout, ProductLayout)
    experts = replayed(module, layout)
    expected = module(*arguments(module))
    torch.testing.assert_close(experts(*arguments(module)), expected, rtol=1e-4, atol=1e-5)
    linears = {name: part for name, part in experts.named_modules() if isinstance(part, nn.Linear)}
    assert linears.keys() == {f"{e}.{name}" for e in range(EXPERTS) for name in ("up", "down")}
    assert linears["3.up"].weight.shape == (INNER, HIDDEN)
    assert set(dict(module.named_parameters())) >= {"up", "down"}, "the fused module is left as it was"
    rows = []
    experts.get_submodule("4.up").register_forward_pre_hook(lambda part, args: rows.append(args[0].shape[-2]))
    with routed(experts, Routing.EVERY_TOKEN):
        torch.testing.assert_close(experts(*arguments(module)), expected, rtol=1e-4, atol=1e-5)
    assert sum(rows) >= TOKENS


@pytest.mark.parametrize("module_class", PROVABLE)
def test_the_layout_does_not_depend_on_weights_and_is_found_on_the_meta_device(module_class):
    with torch.device("meta"):
        on_meta = module_class()
    layout = layout_of(on_meta)
    expert_layouts._LAYOUTS.clear()
    assert layout == layout_of(module_class())
    experts = replayed(on_meta, layout)
    assert all(parameter.is_meta for parameter in experts.parameters())


def test_the_twin_of_a_large_module_takes_little_memory_and_proves_the_same(monkeypatch):
    layout = layout_of(AllScores())
    expert_layouts._LAYOUTS.clear()
    monkeypatch.setattr(expert_layouts, "LARGE_ELEMENTS", 1)
    sizes = []
    random = expert_layouts._random
    monkeypatch.setattr(expert_layouts, "RANDOM_PERIOD", 997)
    monkeypatch.setattr(
        expert_layouts,
        "_random",
        lambda shape, generator: sizes.append((x := random(shape, generator)).untyped_storage().nbytes()) or x,
    )
    assert layout_of(AllScores()) == layout
    assert max(sizes) < 4 * 2 * HIDDEN * INNER, "about one slice, not five"


@pytest.mark.parametrize(
    ("module_class", "reason"),
    [
        (NotAWeightedSum, "compute something else when tokens go every expert computes every token"),
        (HalvesOfASlice, "a product with a part of"),
        (UnknownArguments, "takes 4 arguments"),
        (HoldsItsRouter, "holds linears"),
        (Writes, "is used by mul_"),
    ],
)
def test_what_can_not_be_proven_is_refused_with_the_reason(module_class, reason):
    refusal = layout_of(module_class())
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


class HalfProvable(Stacked):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            y = torch.relu(hidden_states[token] @ self.up[expert].abs()) @ self.down[expert]
            output.index_add_(0, token, y * top_k_weights[token, place, None])
        return output


@torch.no_grad()
def test_a_parameter_that_is_no_factor_stays_and_the_others_are_taken_apart():
    layer = nn.ModuleDict({"experts": HalfProvable()})
    module = layer["experts"]
    expected = module(*arguments(module))
    layer["experts"] = fused_experts(layer)["experts"].unfused("experts", [])
    torch.testing.assert_close(layer["experts"](*arguments(module)), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer["experts"].up, module.up)
    reason = "a parameter of a HalfProvable, no linear: up is used by abs"
    assert matrices_left_out(layer)["experts.up"].startswith(reason)


def test_a_use_that_the_proof_did_not_see_is_an_error_and_no_wrong_number():
    experts = replayed(module := Einsum(), layout_of(module))
    with pytest.raises(ModelStructureError, match="up is used by add"):
        _ = experts.up + 1
    assert experts.up.shape == (EXPERTS, HIDDEN, INNER)
    assert experts.up.device == torch.device("cpu")


@torch.no_grad()
def test_a_copy_of_a_layer_has_its_own_experts():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN))
            self.w2 = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN))

        def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            return torch.relu(x @ w1.T) @ w2

    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.glu = Holder()

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            output = torch.zeros_like(x)
            for expert in range(EXPERTS):
                token, place = torch.where(index == expert)
                w1, w2 = (w.view(EXPERTS, INNER, HIDDEN)[expert] for w in (self.glu.w1, self.glu.w2))
                output.index_add_(0, token, self.glu(x[token], w1, w2) * weights[token, place, None])
            return output

    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Cuts()})})
    found = fused_experts(layer)
    assert list(found) == ["mlp.experts"]
    experts = found["mlp.experts"].unfused("mlp.experts", [])
    expected = experts(*arguments(experts))
    other = copy.deepcopy(experts)
    for linear in (part for part in other.modules() if isinstance(part, nn.Linear)):
        linear.weight.zero_()
    assert not other(*arguments(other)).any()
    assert torch.equal(experts(*arguments(experts)), expected)
