"""What each decoder layer is given on every batch, layer after layer, whatever the model does between its layers.

Two ways, one interface: the skeleton's recorded calls where layers hand their hidden states on and nothing else
(all common decoders), halted forward passes of the whole model where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelStructureError
from ..logs import get_logger
from ..model.decoder_layers import LayerCall, LayerRunner, ProbeCalls, candidate_layers
from ..offload.hidden_states import HiddenStates, HiddenWriter
from .forward_pass import ForwardPass, ModelInputs, kind_of, trial_text
from .paused_forward import HaltedForward, halted_forwards, hand_on, layer_at, like_given
from .skeleton import NotAChainError, Skeleton, merged, record_skeleton
from .text_decoder import Decoder, RunLayer, layers_in_order, order_of_layers, text_forward, towers_on_device

logger = get_logger(__name__)

PROBES = 2
"""Batches at the front that are probes and no data: several tokens, and a single one."""


@dataclass(frozen=True)
class Visit:
    """One run of one decoder layer over all batches."""

    name: str
    is_last: bool
    """No later visit of this layer follows: it may be changed."""


class Feed(Protocol):
    """Gives every decoder layer its inputs, in the order in which the model runs the layers."""

    layer_names: list[str]
    """Decoder layers that run, each once, in the order of their last runs."""

    def visits(self) -> Iterator[Visit]:
        """In the model's order; `run` must have been called for every batch before the next one is asked for."""
        ...

    def probes(self, name: str) -> list[ProbeCalls]:
        """Calls to probe the layer at hand on: of the probe batches, and of a sample, as far as these come to it."""
        ...

    def run_probes(self, runner: LayerRunner) -> None:
        """Let the probe batches go past the layer at hand."""
        ...

    def run(self, runner: LayerRunner, name: str, index: int) -> None:
        """Run the layer at hand on a batch and take its output over."""
        ...


class SkeletonFeed:
    """From a skeleton: `run` makes of a batch's hidden states what enters the next layer.

    The hidden states that enter the layer at hand stay until `hidden` is set: a layer can be run again.
    """

    def __init__(
        self, skeleton: Skeleton, record: Callable[[Sequence[ModelInputs]], Skeleton], samples: Collection[int] = ()
    ):
        """`record` makes the skeleton of other batches; `samples` says which are a processor's outputs."""
        self.skeleton = skeleton
        self.samples = samples
        self.layer_names = skeleton.layer_names
        self.outputs: HiddenWriter | None = None
        """Takes what `run` makes of the batches that are data, in their order. At the next layer that becomes `hidden`;
        who puts another writer here, or None, sets `hidden` himself."""
        self._record = record
        self._hidden = HiddenStates(skeleton.hidden[PROBES:])

    @property
    def hidden(self) -> HiddenStates:
        """What enters the layer at hand, of the batches that are data."""
        return self._hidden

    @hidden.setter
    def hidden(self, states: HiddenStates) -> None:
        self._hidden = states
        self.skeleton.hidden[PROBES:] = states.batches

    def rebatch(self, batches: Sequence[ModelInputs]) -> None:
        """Go on with other micro-batches, the probes at their front; `hidden` is then what enters the first layer."""
        self.skeleton = self._record(batches)
        self.samples = samples_among(batches)
        self._hidden = HiddenStates(self.skeleton.hidden[PROBES:])

    def visits(self) -> Iterator[Visit]:
        for name in self.layer_names:
            self.outputs = HiddenWriter()
            yield Visit(name, is_last=True)
            if self.outputs is not None and self.outputs.shapes:
                self.hidden = self.outputs.finish()

    def probes(self, name: str) -> list[ProbeCalls]:
        hidden = self.skeleton.hidden
        calls = {index: (call, hidden[index]) for index, call in self.skeleton.calls[name].items()}
        return _probes_among(calls, self.samples)

    def run_probes(self, runner: LayerRunner) -> None:
        """Nothing to do: folds are probed on the hidden states that enter the first layer."""

    def run(self, runner: LayerRunner, name: str, index: int) -> None:
        hidden = self.skeleton.hidden[index]
        call = self.skeleton.calls[name].get(index)  # None: this batch goes past the layer
        output = hidden if call is None else runner(call, hidden)
        if self.outputs is not None and index >= PROBES:
            self.outputs.append(output.to(device=hidden.device, dtype=hidden.dtype))


Step = tuple[str, int]
"""Name of a layer, and how often it has run before in the same pass."""


class HaltedFeed:
    """From halted forward passes: `run` lets a batch's pass go on to its next layer."""

    def __init__(
        self,
        passes: Sequence[HaltedForward],
        orders: Sequence[Sequence[str]],
        model_name: str,
        samples: Collection[int] = (),
    ):
        """`orders`: for each pass, the layers that it runs; `samples` as in `SkeletonFeed`."""
        self.passes = passes
        self.samples = samples
        self.model_name = model_name
        steps = [_numbered(order) for order in orders]
        self.order: list[Step] = merged(dict.fromkeys(steps), model_name)
        self.taking_part = {
            step: [index for index, of_pass in enumerate(steps) if step in of_pass] for step in self.order
        }
        names = [name for name, _ in self.order]
        self.layer_names = [name for index, name in enumerate(names) if name not in names[index + 1 :]]
        self.at: list[int] = []
        """The passes that have come to the layer at hand."""

    def visits(self) -> Iterator[Visit]:
        for each in self.passes:
            each.start()
        for index, step in enumerate(self.order):
            self.at = self.taking_part[step]
            name = layer_at([self.passes[i] for i in self.at], self.model_name)
            if name != step[0]:
                raise ModelStructureError(
                    f"The forward pass of {self.model_name} came to layer {name} where it had run {step[0]} before. "
                    "Layers that are skipped at random must be switched off for calibration."
                )
            yield Visit(name, is_last=all(name != later for later, _ in self.order[index + 1 :]))

    def probes(self, name: str) -> list[ProbeCalls]:
        calls = {index: call for index in self.at if (call := self.passes[index].call) is not None}
        given = {index: like_given(call.args, call.kwargs) for index, call in calls.items()}
        return _probes_among({i: (call, _or_nothing(given[i])) for i, call in calls.items()}, self.samples)

    def run_probes(self, runner: LayerRunner) -> None:
        for index in range(PROBES):
            self.run(runner, "", index)

    def run(self, runner: LayerRunner, name: str, index: int) -> None:
        if index in self.at:
            hand_on(self.passes[index], runner)


def _numbered(order: Sequence[str]) -> tuple[Step, ...]:
    return tuple((name, order[:index].count(name)) for index, name in enumerate(order))


def samples_among(batches: Sequence[ModelInputs]) -> list[int]:
    """Indices of those that are a processor's outputs."""
    return [index for index, batch in enumerate(batches) if isinstance(batch, Mapping)]


def _or_nothing(tensor: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None else tensor


def _probes_among(calls: Mapping[int, tuple[LayerCall, Tensor]], samples: Collection[int]) -> list[ProbeCalls]:
    """Of all batches that come to a layer, with their hidden states: the probes, and the smallest sample."""
    found = [ProbeCalls(calls[0], calls[1])] if {0, 1} <= calls.keys() else []
    others = [call for index, call in calls.items() if index in samples]
    if others:
        smallest = min(others, key=lambda call: call[1].numel())
        found.append(ProbeCalls(smallest, calls.get(1, smallest)))
    return found


@contextmanager
def open_feed(
    model: nn.Module,
    batches: Sequence[ModelInputs],  # the first are the probes
    run_layer: RunLayer,
    decoder: Decoder | None = None,  # by default every layer that runs on text
) -> Iterator[Feed]:
    """The feed that suits the model."""
    decoder = decoder or Decoder(ForwardPass(model), candidate_layers(model))
    record = partial(record_skeleton, model, layers=decoder.layers, forward=decoder.forward)
    samples = samples_among(batches)
    with towers_on_device(model, decoder.layers, run_layer):
        try:
            skeleton = record(batches)
        except NotAChainError as reason:
            logger.info("Forward passes of %s are halted at each decoder layer: %s", type(model).__name__, reason)
        except ModelStructureError:
            raise
        except Exception as error:  # of any kind: stubs can break what a model computes between its layers
            logger.info("Forward passes of %s are halted at each decoder layer: %r", type(model).__name__, error)
        else:
            yield SkeletonFeed(skeleton, record, samples)
            return
        kinds = {kind_of(batch): batch for batch in reversed(batches)}
        orders = {
            kind: order_of_layers(model, decoder.layers, batch, run_layer, decoder.forward)
            for kind, batch in kinds.items()
        }
        layers = {name: decoder.layers[name] for name in set(chain.from_iterable(orders.values()))}
        with halted_forwards(model, layers, batches, decoder.forward) as passes:
            orders_of_passes = [orders[kind_of(batch)] for batch in batches]
            yield HaltedFeed(passes, orders_of_passes, type(model).__name__, samples)


def layers_that_run(model: nn.Module, run_layer: RunLayer) -> list[str]:
    """Decoder layers that run on a few tokens of text, in the model's order, each once."""
    forward = text_forward(model, run_layer) or ForwardPass(model)
    return list(dict.fromkeys(layers_in_order(model, candidate_layers(model), trial_text(), run_layer, forward)))
