"""Tests that layers that form no chain get the model's real inputs, and that the model is left unchanged."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from hf_awq_offload.calibration.layer_inputs import PROBES, HaltedFeed, SkeletonFeed, layers_that_run, open_feed
from hf_awq_offload.calibration.paused_forward import halted_forwards
from hf_awq_offload.errors import ModelStructureError
from hf_awq_offload.model.decoder_layers import LayerRunner, candidate_layers

CPU = torch.device("cpu")


class Layer(nn.Module):
    """A residual layer that may take an extra argument and write to a state."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, extra: Tensor | None = None, state: dict | None = None) -> Tensor:
        output = hidden + torch.tanh(self.fc(hidden))
        if extra is not None:
            output = output + extra
        if state is not None:
            output = output + state.get("last", 0)
            state["last"] = output / 2
        return output


class Model(nn.Module):
    """A model that runs its layers as `how` says."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.passes = 0
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.after = nn.ModuleList([Layer()])

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        assert not use_cache
        self.passes += 1
        hidden = self.embed(input_ids)
        first, second, third = self.layers
        if self.how == "a chain":
            return self.after[0](third(second(first(hidden))))
        if self.how == "something between":
            return self.after[0](third(second(first(hidden) * 2)).flip(1))
        if self.how == "a layer twice":
            return second(first(second(first(hidden))))
        if self.how == "an earlier output":
            early = first(hidden)
            return third(second(early), extra=early)
        if self.how == "the embedding":
            return third(second(first(hidden, extra=hidden), extra=hidden), extra=hidden)
        if self.how == "state":
            state: dict = {}
            return third(second(first(hidden, state=state), state=state), state=state)
        if self.how == "skipped" and self.passes > 3:
            return second(hidden * 1.5)
        if self.how == "skipped":
            return second(first(hidden) * 1.5)
        if self.how == "rescaling":
            with torch.no_grad():
                second.fc.weight.div_(2)
            return second(first(hidden))
        assert self.how == "failing"
        first(hidden)
        raise KeyError("between the layers")


WAYS = {
    "a chain": SkeletonFeed,
    "the embedding": SkeletonFeed,
    "something between": HaltedFeed,
    "a layer twice": HaltedFeed,
    "an earlier output": HaltedFeed,
    "state": HaltedFeed,
}


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6), (1, 1), *[(2, 5)] * count]
    return [torch.randint(0, 32, shape, generator=generator) for shape in shapes]


def run_layer(model: nn.Module):
    return lambda name, use: use(LayerRunner(model.get_submodule(name), CPU))


def inputs_of_linears(model: nn.Module, run) -> list[Tensor]:
    """Returns the inputs that the linears receive while `run` runs."""
    seen: list[Tensor] = []
    handles = [
        layer.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        for layer in candidate_layers(model).values()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("how", WAYS)
@torch.no_grad()
def test_every_layer_is_run_on_what_the_model_gives_it(how):
    model = Model(how).eval()
    data = batches()
    expected = [
        inputs_of_linears(model, lambda batch=batch: model(input_ids=batch, use_cache=False)) for batch in data[PROBES:]
    ]
    with open_feed(model, data, run_layer(model)) as feed:
        assert isinstance(feed, WAYS[how])
        for step, visit in enumerate(feed.visits()):
            runner = LayerRunner(model.get_submodule(visit.name), CPU)
            feed.run_probes(runner)
            for index in range(PROBES, len(data)):
                seen = inputs_of_linears(model, lambda index=index: feed.run(runner, visit.name, index))  # noqa: B023
                torch.testing.assert_close(seen, [expected[index - PROBES][step]])
        assert step + 1 == len(expected[0])


def test_only_the_last_of_several_visits_may_change_a_layer():
    model = Model("a layer twice").eval()
    with open_feed(model, batches(), run_layer(model)) as feed:
        assert feed.layer_names == ["layers.0", "layers.1"]
        visits = []
        for visit in feed.visits():
            visits.append((visit.name, visit.is_last))
            runner = LayerRunner(model.get_submodule(visit.name), CPU)
            feed.run_probes(runner)
            for index in range(PROBES, PROBES + 3):
                feed.run(runner, visit.name, index)
    assert visits == [("layers.0", False), ("layers.1", False), ("layers.0", True), ("layers.1", True)]


@pytest.mark.parametrize("how", WAYS)
def test_the_model_is_left_as_it_was_and_no_thread_stays(how):
    model = Model(how).train()
    before = threading.active_count()
    with open_feed(model, batches(), run_layer(model)) as feed:
        next(feed.visits())
    assert threading.active_count() == before
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_probing_a_layer_leaves_no_trace_in_shared_state():
    model = Model("state").eval()
    with open_feed(model, batches(), run_layer(model)) as feed:
        visit = next(feed.visits())
        call, hidden = feed.probes(visit.name)[0].several
        LayerRunner(model.get_submodule(visit.name), CPU, torch.float32).observe(call, hidden)
        assert call.kwargs["state"] == {}


def test_an_error_between_the_layers_reaches_the_caller():
    model = Model("failing").eval()
    with pytest.raises(KeyError, match="between the layers"), open_feed(model, batches(), run_layer(model)):
        pass


def test_layers_that_are_skipped_at_random_are_refused():
    model = Model("skipped").eval()
    with (
        pytest.raises(ModelStructureError, match="switched off for calibration"),
        open_feed(model, batches(), run_layer(model)) as feed,
    ):
        next(feed.visits())


def test_a_model_that_changes_its_own_weights_is_refused():
    model = Model("rescaling").eval()
    with (
        pytest.raises(ModelStructureError, match=r"changes its own weights in place \(layers.1.fc.weight\)"),
        open_feed(model, batches(), run_layer(model)),
    ):
        pass


def test_layers_that_run_are_found_without_data():
    model = Model("a layer twice")
    assert layers_that_run(model, run_layer(model)) == ["layers.0", "layers.1"]


def test_a_pass_that_is_given_up_ends():
    model = Model("a chain").eval()
    with halted_forwards(model, candidate_layers(model), batches()) as passes:
        for each in passes:
            each.start()
        assert {each.at for each in passes} == {"layers.0"}
    assert not any(each._thread.is_alive() for each in passes)
