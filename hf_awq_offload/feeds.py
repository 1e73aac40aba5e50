"""What each decoder layer is given on every batch, layer after layer, whatever the model does between its layers.

Two ways, one interface: the skeleton's recorded calls where layers hand their hidden states on and nothing else
(all common decoders), halted forward passes of the whole model where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ModelStructureError
from .halted import HaltedForward, halted_forwards, layer_at
from .hidden_states import HiddenStates, HiddenWriter
from .layers import LayerRunner, NotAChainError, Skeleton, candidate_layers, record_skeleton
from .logs import get_logger
from .probing import ProbeCalls

logger = get_logger(__name__)

PROBES = 2
"""Batches at the front that are probes and no data: several tokens, and a single one."""

RunLayer = Callable[[str, Callable[[LayerRunner], Any]], Any]
"""Name of a decoder layer and what to do with its runner -> what that returned; puts the layer on its device."""


TRIAL_TOKENS = 8
"""Length of a forward pass that only shows which layers run."""


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

    def probes(self, name: str) -> ProbeCalls:
        """The calls on the probe batches, for the layer at hand."""
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

    def __init__(self, skeleton: Skeleton, record: Callable[[Sequence[Tensor]], Skeleton]):
        """`record` makes the skeleton of other batches."""
        self.skeleton = skeleton
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

    def rebatch(self, batches: Sequence[Tensor]) -> None:
        """Go on with other micro-batches, the probes at their front; `hidden` is then what enters the first layer."""
        self.skeleton = self._record(batches)
        self._hidden = HiddenStates(self.skeleton.hidden[PROBES:])

    def visits(self) -> Iterator[Visit]:
        for name in self.layer_names:
            self.outputs = HiddenWriter()
            yield Visit(name, is_last=True)
            if self.outputs is not None and self.outputs.shapes:
                self.hidden = self.outputs.finish()

    def probes(self, name: str) -> ProbeCalls:
        several, single = ((self.skeleton.calls[name][index], self.skeleton.hidden[index]) for index in (0, 1))
        return ProbeCalls(several, single)

    def run_probes(self, runner: LayerRunner) -> None:
        """Nothing to do: folds are probed on the hidden states that enter the first layer."""

    def run(self, runner: LayerRunner, name: str, index: int) -> None:
        hidden = self.skeleton.hidden[index]
        output = runner(self.skeleton.calls[name][index], hidden)
        if self.outputs is not None and index >= PROBES:
            self.outputs.append(output.to(device=hidden.device, dtype=hidden.dtype))


class HaltedFeed:
    """From halted forward passes: `run` lets a batch's pass go on to its next layer."""

    def __init__(self, passes: Sequence[HaltedForward], order: list[str], model_name: str):
        self.passes = passes
        self.order = order
        self.model_name = model_name
        self.layer_names = [name for index, name in enumerate(order) if name not in order[index + 1 :]]

    def visits(self) -> Iterator[Visit]:
        for each in self.passes:
            each.start()
        for index, expected in enumerate(self.order):
            name = layer_at(self.passes, self.model_name)
            if name != expected:
                raise ModelStructureError(
                    f"The forward pass of {self.model_name} came to layer {name} where it had run {expected} before. "
                    "Layers that are skipped at random must be switched off for calibration."
                )
            yield Visit(name, is_last=name not in self.order[index + 1 :])

    def probes(self, name: str) -> ProbeCalls:
        several, single = (each.call for each in self.passes[:PROBES])
        assert several is not None
        assert single is not None
        nothing = torch.empty(0)
        return ProbeCalls((several, nothing), (single, nothing))

    def run_probes(self, runner: LayerRunner) -> None:
        for each in self.passes[:PROBES]:
            hand_on(each, runner)

    def run(self, runner: LayerRunner, name: str, index: int) -> None:
        hand_on(self.passes[index], runner)


def hand_on(each: HaltedForward, runner: LayerRunner) -> None:
    """Run the layer that a pass has come to, and let the pass go on with tensors of the kind it works with."""
    assert each.call is not None
    floating = [value for value in (*each.call.args, *each.call.kwargs.values()) if isinstance(value, Tensor)]
    like = next((tensor for tensor in floating if tensor.is_floating_point()), None)
    each.go_on(runner.hand_on(each.call, like))


@contextmanager
def open_feed(
    model: nn.Module,
    batches: Sequence[Tensor],  # each (batch, tokens) int64; the first are the probes
    run_layer: RunLayer,
) -> Iterator[Feed]:
    """The feed that suits the model."""
    try:
        skeleton = record_skeleton(model, batches)
    except NotAChainError as reason:
        logger.info("Forward passes of %s are halted at each decoder layer: %s", type(model).__name__, reason)
    except ModelStructureError:
        raise
    except Exception as error:  # of any kind: stubs can break what a model computes between its layers
        logger.info("Forward passes of %s are halted at each decoder layer: %r", type(model).__name__, error)
    else:
        yield SkeletonFeed(skeleton, partial(record_skeleton, model))
        return
    layers = candidate_layers(model)
    order = _order_of_layers(model, layers, batches[0], run_layer)
    layers = {name: layers[name] for name in set(order)}
    with halted_forwards(model, layers, batches) as passes:
        yield HaltedFeed(passes, order, type(model).__name__)


def layers_that_run(model: nn.Module, run_layer: RunLayer) -> list[str]:
    """Decoder layers that run on a few tokens of text, in the model's order, each once."""
    batch = torch.arange(TRIAL_TOKENS).unsqueeze(0)
    try:
        return record_skeleton(model, [batch]).layer_names
    except Exception:  # see open_feed
        return list(dict.fromkeys(_order_of_layers(model, candidate_layers(model), batch, run_layer)))


def _order_of_layers(model: nn.Module, layers: dict[str, nn.Module], batch: Tensor, run_layer: RunLayer) -> list[str]:
    """Names of the decoder layers as a forward pass runs them, with repetitions."""
    order: list[str] = []
    with halted_forwards(model, layers, [batch]) as passes:
        each = passes[0]
        each.start()
        while each.at is not None:
            order.append(each.at)
            run_layer(each.at, lambda runner: hand_on(each, runner))
    if not order:
        raise ModelStructureError(
            f"The forward pass of {type(model).__name__} ran none of its candidate decoder layers; expected a causal "
            "language model that takes input_ids."
        )
    return order
