"""Tests that layers that form no chain get the model's real inputs, and that the model is left unchanged."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hf_awq_offload.calibration.batches import Batches
from hf_awq_offload.calibration.chain_inputs import ChainInputs
from hf_awq_offload.calibration.layer_inputs import LayerInputs
from hf_awq_offload.calibration.opened_inputs import layers_that_run, open_layer_inputs
from hf_awq_offload.calibration.paused_forward import paused_forwards
from hf_awq_offload.calibration.paused_inputs import PausedInputs
from hf_awq_offload.errors import ModelStructureError
from hf_awq_offload.model.decoder_layers import LayerRunner, candidate_layers
from hf_awq_offload.offload.hidden_states import HiddenStates
from hf_awq_offload.offload.hidden_storage import HiddenStorage

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
    "a chain": ChainInputs,
    "the embedding": ChainInputs,
    "something between": PausedInputs,
    "a layer twice": PausedInputs,
    "an earlier output": PausedInputs,
    "state": PausedInputs,
}


def batches(batch_tokens: int = 10) -> Batches:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6), (1, 1), *[(2, 5)] * 3]
    several, single, *data = (torch.randint(0, 32, shape, generator=generator) for shape in shapes)
    return Batches((several, single), data, [None] * len(data), batch_tokens)


def run_layer(model: nn.Module):
    return lambda name, use: use(LayerRunner(model.get_submodule(name), CPU))


class Watcher:
    """Remembers what the linears of a model receive, batch by batch."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.seen: list[list[Tensor]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        handles = [
            layer.fc.register_forward_pre_hook(lambda module, args: self.seen[-1].append(args[0].clone()))
            for layer in candidate_layers(self.model).values()
        ]
        yield
        for handle in handles:
            handle.remove()

    def set_counted_tokens(self, counted: Tensor | None, sequences: Sequence[int] = ()) -> None:
        assert counted is None
        self.seen.append([])


@pytest.mark.parametrize("how", WAYS)
@torch.no_grad()
def test_every_layer_is_run_on_what_the_model_gives_it(how):
    model = Model(how).eval()
    whole = Watcher(model)
    with whole.collecting():
        for batch in batches().data:
            whole.set_counted_tokens(None)
            model(input_ids=batch, use_cache=False)
    with open_layer_inputs(model, batches, 10, run_layer(model)) as inputs:
        assert isinstance(inputs, WAYS[how])
        for step, turn in enumerate(inputs.turns()):
            watcher, outputs = Watcher(model), inputs.next_writer()
            inputs.run(LayerRunner(model.get_submodule(turn.name), CPU), watcher, outputs)
            inputs.advance(outputs)
            torch.testing.assert_close(watcher.seen, [[of_batch[step]] for of_batch in whole.seen])
        assert step + 1 == len(whole.seen[0])


def test_only_the_last_of_several_turns_may_change_a_layer():
    model = Model("a layer twice").eval()
    with open_layer_inputs(model, batches, 10, run_layer(model)) as inputs:
        assert inputs.layer_names == ["layers.0", "layers.1"]
        turns = []
        for turn in inputs.turns():
            turns.append((turn.name, turn.is_last))
            inputs.run(LayerRunner(model.get_submodule(turn.name), CPU))
    assert turns == [("layers.0", False), ("layers.1", False), ("layers.0", True), ("layers.1", True)]


@pytest.mark.parametrize("how", WAYS)
def test_the_model_is_left_as_it_was_and_no_thread_stays(how):
    model = Model(how).train()
    before = threading.active_count()
    with open_layer_inputs(model, batches, 10, run_layer(model)) as inputs:
        next(inputs.turns())
    assert threading.active_count() == before
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_probing_a_layer_leaves_no_trace_in_shared_state():
    model = Model("state").eval()
    with open_layer_inputs(model, batches, 10, run_layer(model)) as inputs:
        turn = next(inputs.turns())
        call, hidden = inputs.probe_calls(turn.name)[0].several
        LayerRunner(model.get_submodule(turn.name), CPU, torch.float32).observe(call, hidden)
        assert call.kwargs["state"] == {}


def test_an_error_between_the_layers_reaches_the_caller():
    model = Model("failing").eval()
    with (
        pytest.raises(KeyError, match="between the layers"),
        open_layer_inputs(model, batches, 10, run_layer(model)),
    ):
        pass


def test_layers_that_are_skipped_at_random_are_refused():
    model = Model("skipped").eval()
    with (
        pytest.raises(ModelStructureError, match="switched off for calibration"),
        open_layer_inputs(model, batches, 10, run_layer(model)) as inputs,
    ):
        next(inputs.turns())


def test_a_model_that_changes_its_own_weights_is_refused():
    model = Model("rescaling").eval()
    with (
        pytest.raises(ModelStructureError, match=r"changes its own weights in place \(layers.1.fc.weight\)"),
        open_layer_inputs(model, batches, 10, run_layer(model)),
    ):
        pass


def test_layers_that_run_are_found_without_data():
    model = Model("a layer twice")
    assert layers_that_run(model, run_layer(model)) == ["layers.0", "layers.1"]


def test_a_pass_that_is_given_up_ends():
    model = Model("a chain").eval()
    with paused_forwards(model, candidate_layers(model), list(batches())) as passes:
        for paused in passes:
            paused.start()
        assert {paused.at for paused in passes} == {"layers.0"}
    assert not any(paused._thread.is_alive() for paused in passes)


def cut(batch_tokens: int) -> Batches:
    """Micro-batches of sequences of five tokens."""
    whole = batches()
    sequences = torch.cat(whole.data).split(batch_tokens // 5)
    return Batches(whole.probes, list(sequences), [None] * len(sequences), batch_tokens)


@pytest.mark.parametrize("spill_bytes", [0, 1 << 30], ids=["spilled", "in RAM"])
@torch.no_grad()
def test_a_chain_comes_back_to_an_earlier_layer_in_other_micro_batches(spill_bytes, tmp_path):
    model = Model("a chain").eval()
    storage = HiddenStorage(spill_bytes=spill_bytes, scratch=tmp_path)

    def inputs_of(inputs: LayerInputs, name: str) -> Tensor:
        watcher = Watcher(model)
        inputs.rewind_to(name)
        inputs.run(LayerRunner(model.get_submodule(name), CPU), watcher)
        return torch.cat([tensor for of_batch in watcher.seen for tensor in of_batch])

    with open_layer_inputs(model, cut, 30, run_layer(model), storage=storage) as inputs:
        assert isinstance(inputs, ChainInputs)
        expected = {name: inputs_of(inputs, name) for name in inputs.layer_names}
        for name in reversed(inputs.layer_names):
            torch.testing.assert_close(inputs_of(inputs, name), expected[name], rtol=0, atol=0)
        inputs.rebatch(20)  # at the first layer, and further on
        for name, batch_tokens in (("layers.1", 10), ("layers.2", 5)):
            torch.testing.assert_close(inputs_of(inputs, name), expected[name])
            inputs.rebatch(batch_tokens)
            assert inputs.batch_tokens == batch_tokens
            torch.testing.assert_close(inputs_of(inputs, name), expected[name])
        torch.testing.assert_close(inputs_of(inputs, "layers.0"), expected["layers.0"])
        assert len(list(tmp_path.rglob("*.bin"))) == (spill_bytes == 0), "one generation is on the disk"
    storage.close()
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_hidden_states_that_were_spilled_are_not_in_ram_as_well(tmp_path, monkeypatch):
    model = Model("a chain").eval()
    kept: list[weakref.ref[Tensor]] = []
    keep_first = HiddenStorage.keep_first

    def watched(self: HiddenStorage, states: HiddenStates) -> HiddenStates:
        kept.extend(weakref.ref(batch) for batch in states.batches)
        return keep_first(self, states)

    monkeypatch.setattr(HiddenStorage, "keep_first", watched)
    storage = HiddenStorage(spill_bytes=0, scratch=tmp_path)
    with open_layer_inputs(model, cut, 10, run_layer(model), storage=storage):
        gc.collect()
        assert len(kept) == 3
        assert not any(reference() is not None for reference in kept)
    storage.close()
