"""The contract between the loop over decoder layers and what feeds them.

Two kinds keep it. `ChainInputs` replays recorded calls where layers pass their hidden states on and nothing else; all
common decoders do. `PausedInputs` pauses forward passes of the whole model where they do not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..model.decoder_layers import LayerCall, LayerRunner, ProbeCalls
from ..offload.hidden_states import HiddenWriter


@dataclass(frozen=True)
class LayerTurn:
    """One run of one decoder layer over all batches."""

    name: str
    is_last: bool
    """Whether the model does not run this layer again after it: the layer may be changed."""


class Collector(Protocol):
    """Watches a decoder layer while it runs on data."""

    def collecting(self) -> AbstractContextManager[None]:
        """Watches every forward pass inside the context."""
        ...

    def set_counted_tokens(self, counted: Tensor | None, sequences: Sequence[int] = ()) -> None:
        """Says before each batch which of its tokens count, (batch, tokens) bool; None means all.

        `sequences` has the number of each of its sequences, for errors.
        """
        ...


class LayerInputs(Protocol):
    """Gives each decoder layer its inputs on all batches, in the order in which the model runs the layers.

    The loop takes turn after turn. In each it calls `run`, as often as `can_run_again` allows, then `advance`.
    """

    layer_names: list[str]
    """The decoder layers that run, each once, in the order of their last turns."""
    can_run_again: bool
    """Whether a layer can be skipped, run again, or run in other micro-batches, because its inputs are kept."""

    @property
    def batch_tokens(self) -> int:
        """The most tokens of a micro-batch."""
        ...

    @property
    def hidden_batches(self) -> list[Tensor]:
        """The hidden states that enter the next layer, for each batch of data that waits for it.

        After the last layer of a chain, they are its outputs.
        """
        ...

    def turns(self) -> Iterator[LayerTurn]:
        """Yields the turns in the model's order."""
        ...

    def probe_calls(self, name: str) -> list[ProbeCalls]:
        """Returns short calls of the layer to probe it on: of the probes, and of a sample, if these reach it."""
        ...

    def rewind_to(self, name: str) -> None:
        """Makes the inputs of this layer those that `run` uses, whichever layers ran last."""
        ...

    def rebatch(self, batch_tokens: int) -> None:
        """Cuts the data into other micro-batches."""
        ...

    def run(self, runner: LayerRunner, collector: Collector | None = None, into: HiddenWriter | None = None) -> None:
        """Runs the layer whose turn it is on all batches.

        Args:
            runner: runs the layer.
            collector: watches the batches that are data.
            into: takes the layer's outputs on the data, batch by batch.
        """
        ...

    def next_writer(self) -> HiddenWriter | None:
        """Returns what `run` is to write outputs into; None if nothing needs them."""
        ...

    def advance(self, outputs: HiddenWriter | None) -> None:
        """Ends a turn: the outputs of the layer become the inputs of the next one."""
        ...


def probe_calls_among(calls: Mapping[int, tuple[LayerCall, Tensor]], samples: Collection[int]) -> list[ProbeCalls]:
    """Returns what to probe a layer on.

    Args:
        calls: index of a batch that reaches the layer, probes first -> the call, and its hidden states.
        samples: indices of the batches that are a processor's outputs; the smallest of them is probed on, too.
    """
    probes = [ProbeCalls(calls[0], calls[1])] if {0, 1} <= calls.keys() else []
    calls_of_samples = [call for index, call in calls.items() if index in samples]
    if calls_of_samples:
        smallest = min(calls_of_samples, key=lambda call: call[1].numel())
        probes.append(ProbeCalls(smallest, calls.get(1, smallest)))
    return probes
