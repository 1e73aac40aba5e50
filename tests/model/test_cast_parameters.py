"""Tests that a layer computes in fp32 on weights in half precision, with the bits of a layer that was cast."""

from __future__ import annotations

import copy
from weakref import WeakSet

import pytest
import torch
from models import tiny_ernie_moe, tiny_gemma, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_batch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_awq_offload.calibration.skeleton import record_skeleton
from hf_awq_offload.model.cast_parameters import parameters_in_fp32
from hf_awq_offload.model.decoder_layers import HIDDEN, LayerCall, LayerRunner, ProbeCalls
from hf_awq_offload.model.fold_probing import discover_structure
from hf_awq_offload.model.fused_experts import take_experts_apart
from hf_awq_offload.model.probe_runner import ProbeRunner
from hf_awq_offload.model.scalings import Scaling

CPU = torch.device("cpu")


class OneLayer(nn.Module):
    """Reads a child's weight as its own, a shared weight, a stack of matrices, and a buffer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.same = self.up
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.up.weight
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden) + self.shift
        inner = torch.tanh(linear(x, self.up.weight, self.up.bias)) + self.same(x) + self.tied(x)
        output = self.down(inner)
        for index in range(len(self.stack)):
            output = output @ self.stack[index]
        return hidden + output + torch.einsum("bth,hio->bto", hidden[..., :3], self.stack)


def half(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return module.to(dtype)


def one_layer() -> OneLayer:
    torch.manual_seed(0)
    return half(OneLayer())


def scaled_by_hand(layer: nn.Module, name: str, scaling: Scaling) -> nn.Module:
    """Returns a copy of the layer in fp32 with one parameter scaled."""
    twin = copy.deepcopy(layer).float()
    owner = twin.get_submodule(name.rpartition(".")[0])
    parameter = owner.get_parameter(name.rpartition(".")[2])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(scaling.of(parameter.detach())))
    return twin


SCALINGS = {
    "norm.weight": Scaling(torch.linspace(0.5, 2, 8)),
    "down.weight": Scaling(torch.linspace(0.5, 2, 16)[None]),
    "down.bias": Scaling(3.0),
    "stack": Scaling(torch.linspace(0.5, 2, 8).view(1, 8, 1)),
}


KEPT = pytest.mark.parametrize("keeps_casts", [False, True], ids=["cast anew", "casts kept"])


@KEPT
@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_parameter_gives_the_bits_of_a_scaled_copy(name, keeps_casts):
    layer, hidden = one_layer(), torch.randn(2, 4, 8)
    run, call = ProbeRunner(layer, CPU, keeps_casts), (LayerCall((HIDDEN,), {}), hidden)
    plain = run.observe(call)[0]
    output = run.observe(call, {name: [SCALINGS[name]]})[0]
    assert torch.equal(output, scaled_by_hand(layer, name, SCALINGS[name])(hidden).detach())
    assert not output.requires_grad
    assert torch.equal(run.observe(call)[0], plain)


def test_a_weight_that_its_parent_reads_is_scaled_there_too():
    layer, hidden = one_layer(), torch.randn(2, 4, 8)
    call, factor = (LayerCall((HIDDEN,), {}), hidden), Scaling(torch.linspace(0.5, 2, 16)[:, None])
    run = ProbeRunner(layer, CPU)
    expected = copy.deepcopy(layer).float()
    expected.tied.weight = nn.Parameter(
        expected.up.weight.detach().clone()
    )  # a twin by memory is a parameter of its own
    expected.up.weight = nn.Parameter(factor.of(expected.up.weight.detach()))
    for name in ("up.weight", "same.weight"):  # one module under two names
        assert torch.equal(run.observe(call, {name: [factor]})[0], expected(hidden).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_layers_own_parameters_stay_even_after_an_error(dtype):
    layer = half(OneLayer(), dtype)
    before = {name: (value, value.detach().clone()) for name, value in layer.named_parameters(remove_duplicate=False)}
    tables = {name: module._parameters for name, module in layer.named_modules()}
    call = LayerCall((HIDDEN,), {})
    run, scalings = ProbeRunner(layer, CPU), {name: [scaling] for name, scaling in SCALINGS.items()}
    run.observe((call, torch.randn(2, 4, 8)), scalings)
    with pytest.raises(RuntimeError):
        run.observe((call, torch.randn(2, 4, 9)), scalings)
    for name, value in layer.named_parameters(remove_duplicate=False):
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    assert all(module._parameters is tables[name] for name, module in layer.named_modules())


def test_several_scalings_of_a_parameter_follow_each_other():
    layer, hidden = one_layer(), torch.randn(2, 4, 8)
    both = [Scaling(torch.linspace(0.5, 2, 8), adds_one=True), Scaling(1.7)]
    twin = copy.deepcopy(layer).float()
    twin.norm.weight = nn.Parameter(((1 + twin.norm.weight.detach()) * both[0].factor - 1) * 1.7)
    output = ProbeRunner(layer, CPU).observe((LayerCall((HIDDEN,), {}), hidden), {"norm.weight": both})
    assert torch.equal(output[0], twin(hidden).detach())


def test_however_a_table_of_parameters_is_read_it_gives_fp32():
    layer = one_layer()
    with parameters_in_fp32(layer, {"stack": [Scaling(2.0)]}, {"down.bias"}):
        assert layer.down.weight.dtype == torch.float32
        assert layer.down.bias.dtype == torch.bfloat16
        for table in (dict(layer.down._parameters), {**layer.down._parameters}, layer.down._parameters.copy()):
            assert table["weight"].dtype == torch.float32
        assert layer.down._parameters.get("weight").dtype == torch.float32
        assert layer.down._parameters.get("nothing") is None
        assert {name for name, _ in layer.named_parameters()} >= {"stack", "norm.weight"}
        stack = layer.stack
        assert (stack.shape, stack.dtype, stack.device, stack.ndim) == ((3, 8, 8), torch.float32, CPU, 3)
    own = layer.stack.detach().float() * 2
    assert torch.equal(stack[1], own[1])
    assert torch.equal(stack[torch.tensor(1), 2:4], own[1, 2:4])
    assert torch.equal(stack[-1, :, 1], own[-1, :, 1])
    for index in (torch.tensor([0, 2]), slice(1, None), (slice(None), 1), None, torch.tensor([True, False, True])):
        assert torch.equal(stack[index], own[index])
    assert torch.equal(torch.bmm(own, stack), torch.bmm(own, own))
    assert torch.equal(torch.cat([stack, stack]), torch.cat([own, own]))


@KEPT
@pytest.mark.parametrize("apart", [False, True], ids=["as built", "experts taken apart"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma, tiny_mixtral, tiny_ernie_moe, tiny_gpt_oss])
def test_the_bits_are_those_of_a_layer_that_was_cast_as_a_whole(build, apart, keeps_casts):
    model = build().to(torch.bfloat16)
    model.config._experts_implementation = "eager"
    if apart:
        take_experts_apart(model, all_kinds=True)
    skeleton = record_skeleton(model, [token_batch(1, 16)])
    layer, call = model.model.layers[0], (skeleton.calls["model.layers.0"][0], skeleton.hidden[0])
    expected = LayerRunner(layer, CPU, torch.float32).observe(*call)
    found = ProbeRunner(layer, CPU, keeps_casts).observe(call)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_a_layer_may_write_to_what_it_is_called_on():
    class Writing(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            return hidden.add_(1).mul_(mask.add_(1))

    layer, hidden, mask = Writing(), torch.zeros(1, 2, 4), torch.ones(4)
    run = ProbeRunner(layer, CPU)
    call = run.on_device((LayerCall((HIDDEN, mask), {}), hidden))
    outputs = [run.observe(call)[0] for _ in range(2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not hidden.any()
    assert torch.equal(mask, torch.ones(4))


def test_one_probe_at_a_time_holds_the_layer_in_fp32(monkeypatch):
    model = half(tiny_mixtral())
    take_experts_apart(model, all_kinds=True)
    alive: WeakSet[ProbeRunner] = WeakSet()
    original, counts = ProbeRunner.__init__, []

    def counted(runner: ProbeRunner, *args: object) -> None:
        alive.add(runner)
        counts.append(len(alive))
        original(runner, *args)

    monkeypatch.setattr(ProbeRunner, "__init__", counted)
    skeleton = record_skeleton(model, [token_batch(1, 16), token_batch(1, 1)])
    calls, hidden = skeleton.calls["model.layers.0"], skeleton.hidden
    discover_structure(model.model.layers[0], ProbeCalls((calls[0], hidden[0]), (calls[1], hidden[1])), CPU, seed=0)
    assert counts == [1, 1, 1]  # for what is found, then for its proofs under two kinds of routing
