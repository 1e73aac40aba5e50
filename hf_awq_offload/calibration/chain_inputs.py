"""Inputs of decoder layers that form a chain: each layer is given its predecessor's hidden states and nothing else new.

The skeleton pass has recorded every call, less its hidden states. These wait in RAM or in a file, so that a layer can
run again, in other micro-batches too, and a run can resume where an earlier one stopped.

A layer for multi-token prediction may follow the last layer of the chain. What enters it is computed from the outputs
of that one; it is called as the layer of the chain that it is like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext

from torch import Tensor

from ..logs import get_logger
from ..model.decoder_layers import LayerCall, LayerRunner, ProbeCalls
from ..offload.hidden_readback import HiddenReadback
from ..offload.hidden_states import HiddenStates, HiddenWriter
from ..offload.hidden_storage import HiddenStorage
from .batches import Batches
from .forward_pass import ModelInputs
from .layer_inputs import Collector, LayerTurn, probe_calls_among
from .mtp_inputs import MtpInputs
from .skeleton import Skeleton
from .text_decoder import RunLayer

logger = get_logger(__name__)


class ChainInputs:
    """Keeps the contract of `LayerInputs` for decoder layers that form a chain.

    Args:
        skeleton: what the skeleton pass recorded on `batches`.
        batches: probes and data.
        record: makes the skeleton of other batches.
        cut: makes batches of at most so many tokens.
        storage: keeps the hidden states.
        run_layer: brings a layer to its device to run it.
        mtp: computes what enters the layer for multi-token prediction, if there is one.
    """

    can_run_again = True

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Batches,
        record: Callable[[Iterable[ModelInputs]], Skeleton],
        cut: Callable[[int], Batches],
        storage: HiddenStorage,
        run_layer: RunLayer,
        mtp: MtpInputs | None = None,
    ):
        self.layer_names = skeleton.layer_names + ([] if mtp is None else [mtp.name])
        self._mtp = mtp
        self._record, self._cut, self._storage, self._run_layer = record, cut, storage, run_layer
        self._start(skeleton, batches)

    def _start(
        self, skeleton: Skeleton, batches: Batches, hidden: HiddenStates | None = None, position: int = 0
    ) -> None:
        """Begins at the first layer, or at another one with the hidden states that enter it."""
        n_probes = len(batches.probes)
        self.output_forms = skeleton.outputs
        """Class of a layer -> what one layer of this class returned on a probe."""
        self.calls: dict[str, dict[int, LayerCall]] = skeleton.calls
        """Layer -> index of a batch that reaches it, probes counted -> the recorded call."""
        if self._mtp is not None:
            self.calls = {**skeleton.calls, self._mtp.name: skeleton.calls[self._mtp.twin]}
        self._batches = batches
        self._hidden_of_probes = skeleton.hidden[:n_probes]
        if hidden is None:
            hidden = self._storage.keep_first(HiddenStates(skeleton.hidden[n_probes:]))
        self._hidden = hidden
        self._position = position
        """Index of the layer that `_hidden` enters."""

    @property
    def batch_tokens(self) -> int:
        return self._batches.tokens

    @property
    def hidden_batches(self) -> list[Tensor]:
        return self._hidden.batches

    def turns(self) -> Iterator[LayerTurn]:
        for name in self.layer_names:
            yield LayerTurn(name, is_last=True)

    def probe_calls(self, name: str) -> list[ProbeCalls]:
        """The probes' hidden states are those that enter the first layer: folds do not depend on them."""
        hidden: list[Tensor] = [*self._hidden_of_probes, *self._hidden.batches]
        calls = {index: (call, hidden[index]) for index, call in self.calls[name].items()}
        return probe_calls_among(calls, self._batches.samples)

    def run(self, runner: LayerRunner, collector: Collector | None = None, into: HiddenWriter | None = None) -> None:
        calls = self.calls[self.layer_names[self._position]]
        first = len(self._batches.probes)
        outputs = None if into is None else HiddenReadback(into)
        with nullcontext() if collector is None else collector.collecting():
            batches = zip(self._hidden.batches, self._counted(), strict=True)
            for index, (hidden, counted) in enumerate(batches, start=first):
                if collector is not None:
                    collector.set_counted_tokens(counted, self._batches.numbers_of(index - first))
                call = calls.get(index)  # None: this batch passes the layer by
                self._run_batch(runner, call, hidden, outputs)
        if outputs is not None:
            outputs.finish()

    def _counted(self) -> Sequence[Tensor | None]:
        return self._batches.counted if self._mtp is None or not self._is_at_mtp else self._mtp.counted(self._batches)

    @staticmethod
    def _run_batch(runner: LayerRunner, call: LayerCall | None, hidden: Tensor, into: HiddenReadback | None) -> None:
        """Runs one batch; on return, no tensor of it is left on the execution device, which may still be at work."""
        output = hidden if call is None else runner(call, hidden)
        if into is not None:
            into.append(output, hidden.dtype)

    def next_writer(self) -> HiddenWriter | None:
        following = self._position + 1
        return self._storage.writer(following) if following < len(self.layer_names) else None

    def advance(self, outputs: HiddenWriter | None) -> None:
        if outputs is not None:
            self._hidden = self._storage.written(self._position + 1, outputs)
            self._position += 1
            self._compute_inputs_of_mtp()

    # -- multi-token prediction --------------------------------------------------------------------------------------

    @property
    def _is_at_mtp(self) -> bool:
        return self._mtp is not None and self._position == len(self.layer_names) - 1

    def _compute_inputs_of_mtp(self) -> None:
        """Turns the outputs of the chain's last layer into what enters the layer for multi-token prediction.

        The journal keeps these outputs, so that a resumed run does the same.
        """
        if self._mtp is None or not self._is_at_mtp:
            return
        with closing(self._storage.scratch_writer(self._position)) as entering:
            for batch in self._mtp.entering(self._batches, self._hidden.batches):
                entering.append(batch)
            self._hidden = self._storage.finished(entering)

    # -- resuming, and starting over ---------------------------------------------------------------------------------

    def rewind_to(self, name: str) -> None:
        """Takes the hidden states from the journal, or runs the layers before this one as they are."""
        index = self.layer_names.index(name)
        if self._position == index:
            return
        start = self._storage.last_committed(index)
        if self._position <= index:
            start = max(start, self._position)
        if start != self._position:
            self._take_committed(start)
        for earlier in range(start, index):
            self._pass_through(self.layer_names[earlier])

    def rebatch(self, batch_tokens: int) -> None:
        """Cuts the data into other micro-batches; the hidden states still enter the layer that they entered."""
        self._go_to(self._position, self._hidden, batch_tokens)

    def _go_to(self, position: int, hidden: HiddenStates | None, batch_tokens: int) -> None:
        """Cuts micro-batches and goes to a layer with the hidden states that enter it; the first needs none."""
        if position and batch_tokens == self.batch_tokens:
            assert hidden is not None
            self._hidden, self._position = hidden.regrouped(self._batches.sequences), position
            return
        batches = self._cut(batch_tokens)
        regrouped = hidden.regrouped(batches.sequences) if position and hidden is not None else None
        self._start(self._record(batches), batches, regrouped, position)

    def _take_committed(self, start: int) -> None:
        """Goes to the layer of this index, the first or one whose hidden states the journal has."""
        earlier = self._storage.batch_tokens_of(self.layer_names[start - 1]) if start else None
        self._go_to(start, self._storage.committed(start), self.batch_tokens if earlier is None else earlier)
        self._compute_inputs_of_mtp()

    def _pass_through(self, name: str) -> None:
        """Runs a layer that is finished, in the micro-batches that it had then, for its outputs alone."""
        logger.info("Forward pass through %s: the journal no longer has its outputs.", name)
        batch_tokens = self._storage.batch_tokens_of(name)
        if batch_tokens is not None and batch_tokens != self.batch_tokens:
            self.rebatch(batch_tokens)
        with closing(self._storage.scratch_writer(self._position + 1)) as outputs:
            self._run_layer(name, lambda runner: self.run(runner, into=outputs))
            self._hidden = self._storage.finished(outputs)
        self._position += 1
        self._compute_inputs_of_mtp()
