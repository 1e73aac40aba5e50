"""Inputs of decoder layers that form no chain: the model's own forward passes, paused at each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..errors import ModelStructureError
from ..model.decoder_layers import LayerRunner, ProbeCalls
from ..offload.hidden_states import HiddenWriter
from .batches import Batches
from .layer_inputs import Collector, LayerTurn, probe_calls_among
from .paused_forward import PausedForward, layer_at, like_given, run_and_resume
from .skeleton import merged

Step = tuple[str, int]
"""Name of a layer, and how often it has run before in the same pass."""


class PausedInputs:
    """Keeps the contract of `LayerInputs` with one paused forward pass for each batch.

    A pass waits for the output of the layer at hand, so each layer has to run, and runs once in each turn.

    Args:
        passes: one for each of `batches`, not started yet.
        orders: for each pass, the layers in the order in which it runs them.
        batches: probes and data.
        model_name: for errors.
    """

    can_run_again = False

    def __init__(
        self, passes: Sequence[PausedForward], orders: Sequence[Sequence[str]], batches: Batches, model_name: str
    ):
        self._passes, self._batches, self._model_name = passes, batches, model_name
        steps = [_numbered(order) for order in orders]
        self._order: list[Step] = merged(dict.fromkeys(steps), model_name)
        self._taking_part = {
            step: [index for index, of_pass in enumerate(steps) if step in of_pass] for step in self._order
        }
        names = [name for name, _ in self._order]
        self.layer_names = [name for index, name in enumerate(names) if name not in names[index + 1 :]]
        self._waiting: list[int] = []
        """Indices of the passes that wait at the layer at hand."""

    @property
    def batch_tokens(self) -> int:
        return self._batches.tokens

    @property
    def hidden_batches(self) -> list[Tensor]:
        calls = [paused.call for paused in self._passes[len(self._batches.probes) :]]
        given = [like_given(call.args, call.kwargs) for call in calls if call is not None]
        return [tensor for tensor in given if tensor is not None]

    def turns(self) -> Iterator[LayerTurn]:
        for paused in self._passes:
            paused.start()
        for index, step in enumerate(self._order):
            self._waiting = self._taking_part[step]
            name = layer_at([self._passes[i] for i in self._waiting], self._model_name)
            if name != step[0]:
                raise ModelStructureError(
                    f"The forward pass of {self._model_name} came to layer {name} where it had run {step[0]} before. "
                    "Layers that are skipped at random must be switched off for calibration."
                )
            yield LayerTurn(name, is_last=all(name != later for later, _ in self._order[index + 1 :]))

    def probe_calls(self, name: str) -> list[ProbeCalls]:
        calls = {index: call for index in self._waiting if (call := self._passes[index].call) is not None}
        given = {index: like_given(call.args, call.kwargs) for index, call in calls.items()}
        return probe_calls_among({i: (call, _or_empty(given[i])) for i, call in calls.items()}, self._batches.samples)

    def run(self, runner: LayerRunner, collector: Collector | None = None, into: HiddenWriter | None = None) -> None:
        assert into is None, "each pass keeps its own hidden states"
        n_probes = len(self._batches.probes)
        for index in range(n_probes):
            self._run_batch(runner, index)
        with nullcontext() if collector is None else collector.collecting():
            for index, counted in enumerate(self._batches.counted, start=n_probes):
                if collector is not None:
                    collector.set_counted_tokens(counted, self._batches.numbers_of(index - n_probes))
                self._run_batch(runner, index)

    def _run_batch(self, runner: LayerRunner, index: int) -> None:
        if index in self._waiting:
            run_and_resume(self._passes[index], runner)

    def next_writer(self) -> None:
        return None

    def advance(self, outputs: HiddenWriter | None) -> None:
        """Does nothing: the passes have resumed with the layer's outputs already."""

    def rewind_to(self, name: str) -> None:
        """Does nothing: the passes wait at the layer whose turn it is."""

    def rebatch(self, batch_tokens: int) -> None:
        raise NotImplementedError("paused forward passes cannot be cut into other micro-batches")


def _numbered(order: Sequence[str]) -> tuple[Step, ...]:
    return tuple((name, order[:index].count(name)) for index, name in enumerate(order))


def _or_empty(tensor: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None else tensor
