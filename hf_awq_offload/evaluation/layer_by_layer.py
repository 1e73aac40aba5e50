"""Sends held-out text through a model and its original, one decoder layer of each at a time.

    for each decoder layer:   the original's runs on all text, then the model's; their outputs are compared
    at the end:               last hidden states -> logits, in blocks of rows -> distances

Memory holds a layer, those that are read ahead, a micro-batch, and the hidden states of both models, which go to a file
where they are large. The layers' inputs come from where calibration takes them: a chain, or paused forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.batches import Batches
from ..calibration.chain_inputs import ChainInputs
from ..calibration.layer_inputs import LayerInputs
from ..calibration.opened_inputs import open_layer_inputs
from ..calibration.text_decoder import Decoder, find_decoder
from ..errors import ModelStructureError
from ..model.decoder_layers import calibration_mode, candidate_layers, runner_on
from ..model.probe_memory import PROBE_TOKENS
from ..offload.hidden_states import HiddenStates
from ..offload.hidden_storage import HiddenStorage
from ..offload.memory_limit import release_freed
from ..offload.onloader import Onloader
from ..reporting.distances import Distances
from ..reporting.evaluation import Evaluation, LayerError, Window, evaluation_of, scored_blocks, scored_rows
from ..reporting.progress import Progress
from .final_states import KeptOutputs, run_after_layers
from .head import Head, head_of, require_body

VALUES_AT_A_TIME = 1 << 20
"""Hidden states are compared in pieces of so many values."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose decoder layers come to the execution device one at a time."""

    model: PreTrainedModel
    onloader: Onloader
    hidden: HiddenStorage

    def close(self) -> None:
        """Drops what was prefetched, and deletes scratch files."""
        self.onloader.close()
        self.hidden.close()


def evaluate_layer_by_layer(
    model: EvaluatedModel,
    reference: EvaluatedModel | None,  # the original
    windows: Sequence[Window],
    batch_tokens: int,  # of a micro-batch, at most, unless a window is longer
) -> Evaluation:
    """Measures `model` on windows of text, against the text itself and against `reference`.

    Raises:
        ModelStructureError: the two models do not run the same layers, or a head can't run by itself.
        NumericalError: logits are not a number.
    """
    stretches = micro_batches_of(windows, batch_tokens)
    with ExitStack() as stack:
        passes = [
            stack.enter_context(_passing(evaluated, stretches, batch_tokens))
            for evaluated in (model, reference)
            if evaluated is not None
        ]
        errors = _through_layers(passes, stack.enter_context(Progress("Evaluating")))
        finals = [one.finished() for one in passes]
        heads = [stack.enter_context(one.head()) for one in passes]
        distances = _distances(stretches, finals, heads)
    return evaluation_of(distances, errors, streamed=True)


def micro_batches_of(windows: Sequence[Window], batch_tokens: int) -> list[Window]:
    """Puts windows of one length with equally many scored tokens together, in their order."""
    batches: list[list[Window]] = []
    for window in windows:
        fits = bool(batches) and _can_join(batches[-1], window, batch_tokens)
        if not fits:
            batches.append([])
        batches[-1].append(window)
    return [Window(torch.cat([window.token_ids for window in batch]), batch[0].predicted) for batch in batches]


def _can_join(batch: list[Window], window: Window, batch_tokens: int) -> bool:
    alike = batch[0].token_ids.shape[1] == window.token_ids.shape[1] and batch[0].predicted == window.predicted
    return alike and sum(each.token_ids.numel() for each in (*batch, window)) <= batch_tokens


def _through_layers(passes: Sequence[_Pass], progress: Progress) -> list[LayerError]:
    """Runs all layers; returns how far the first model's hidden states are from the second's after each."""
    names = [one.inputs.layer_names for one in passes]
    if any(other != names[0] for other in names):
        first = next((pair for pair in zip(*names, strict=False) if pair[0] != pair[1]), None)
        raise ModelStructureError(
            f"The models run different decoder layers: {len(names[0])} and {len(names[1])}"
            + (f", the first that differs being {first[0]} and {first[1]}" if first else "")
            + ". Expected a model and the original that it was quantized from."
        )
    progress.expect(len(names[0]))
    errors = []
    for turns in zip(*(one.inputs.turns() for one in passes), strict=True):
        for one, turn in zip(passes, turns, strict=True):
            progress.phase("forward", turn.name)
            one.run_layer(turn.name)
        release_freed()
        facts = []
        if turns[0].is_last and len(passes) > 1:
            hidden, original = (one.hidden_batches for one in passes)
            if hidden:  # none where the last layer of paused passes has run: they are over
                errors.append(LayerError(turns[0].name, relative_error(hidden, original)))
                facts = [f"relative error {errors[-1].relative_error:.3g}"]
        if turns[0].is_last:
            progress.passed(turns[0].name, facts)
    if len(passes) > 1 and len(errors) < len(names[0]):
        hidden, original = (one.finished().batches for one in passes)
        errors.append(LayerError(names[0][-1], relative_error(hidden, original)))
    return errors


def relative_error(hidden: Sequence[Tensor], original: Sequence[Tensor]) -> float:
    """Returns ‖h - h₀‖ / ‖h₀‖ over all batches: squares are summed in fp32 within a piece, and in fp64 beyond."""
    error = norm = 0.0
    for batch, expected in zip(hidden, original, strict=True):
        pieces = (tensor.reshape(-1).split(VALUES_AT_A_TIME) for tensor in (batch, expected))
        for piece, wanted in zip(*pieces, strict=True):
            error += float((piece.float() - wanted.float()).square_().sum())
            norm += float(wanted.float().square().sum())
    return math.sqrt(error / norm) if norm else math.inf if error else 0.0


def _distances(stretches: Sequence[Window], finals: Sequence[HiddenStates], heads: Sequence[Head]) -> Distances:
    distances = Distances(has_reference=len(heads) > 1)
    vocabulary = 0
    for stretch, *states in zip(stretches, *(final.batches for final in finals), strict=True):
        rows_of = [scored_rows(batch, stretch.predicted) for batch in states]
        ids = scored_rows(stretch.token_ids, stretch.predicted)
        if not vocabulary:
            vocabulary = heads[0].logits(rows_of[0][:1], ids[:1]).shape[-1]
            for head, rows in zip(heads, rows_of, strict=True):
                head.require_rows_apart(rows[:2], ids[:2])
        for block, targets, positions in scored_blocks(stretch, vocabulary):
            logits = [head.logits(rows[block], ids[block]) for head, rows in zip(heads, rows_of, strict=True)]
            distances.add(logits[0], logits[1] if len(logits) > 1 else None, targets, positions)
    return distances


class _Pass:
    """One model's way through its layers.

    Args:
        evaluated: the model.
        inputs: of its layers.
        forward: runs what surrounds them.
        stretches: the micro-batches of text.
    """

    def __init__(
        self, evaluated: EvaluatedModel, inputs: LayerInputs, forward: KeptOutputs, stretches: Sequence[Window]
    ):
        self.evaluated, self.inputs = evaluated, inputs
        self._forward, self._stretches = forward, stretches
        self._finished: HiddenStates | None = None

    @property
    def hidden_batches(self) -> list[Tensor]:
        return self.inputs.hidden_batches

    def run_layer(self, name: str) -> None:
        """Runs the layer whose turn it is on all batches."""
        onloader, storage = self.evaluated.onloader, self.evaluated.hidden
        if not isinstance(self.inputs, ChainInputs):
            onloader.run_layer(name, self.inputs.run)
            return
        with closing(storage.scratch_writer(self.inputs.layer_names.index(name) + 1)) as outputs:
            with onloader.onloaded(name) as layer:
                self.inputs.run(runner_on(layer, onloader.device), into=outputs)
            self.inputs.advance(outputs)

    def finished(self) -> HiddenStates:
        """Returns the last hidden states, which the head takes, once all layers have run."""
        if self._finished is not None:
            return self._finished
        storage, batches = self.evaluated.hidden, [stretch.token_ids for stretch in self._stretches]
        with closing(storage.scratch_writer(len(self.inputs.layer_names) + 1)) as writer:
            if isinstance(self.inputs, ChainInputs):
                layers, forms = candidate_layers(self.evaluated.model), self.inputs.output_forms
                layers = {name: layers[name] for name in self.inputs.layer_names}
                with self.evaluated.onloader.non_layer_weights_loaded():
                    for batch, hidden in zip(batches, self.inputs.hidden_batches, strict=True):
                        writer.append(run_after_layers(self._forward, layers, forms, batch, hidden))
            else:
                for batch in batches:
                    writer.append(self._forward.take(batch))
            self._finished = storage.finished(writer)
        return self._finished

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Yields the model's head, on the execution device."""
        onloader = self.evaluated.onloader
        with head_of(self.evaluated.model, self._forward.template, onloader.device, onloader.weights) as head:
            yield head


@contextmanager
def _passing(evaluated: EvaluatedModel, stretches: Sequence[Window], batch_tokens: int) -> Iterator[_Pass]:
    """Yields a model whose layers wait for the text."""
    model, onloader = evaluated.model, evaluated.onloader
    body = require_body(model)
    with ExitStack() as stack:
        stack.enter_context(calibration_mode(model))
        stack.enter_context(onloader.on_demand())
        with onloader.non_layer_weights_loaded():
            found, _ = find_decoder(model, [], onloader.run_layer, needs_text=True)
        if found.forward.text is not body:
            raise ModelStructureError(
                f"{type(model).__name__} does not run on text alone, only its text decoder does. Evaluate the text "
                "decoder, saved as a model of its own."
            )
        forward = KeptOutputs(model, body)
        text = stretches[0].token_ids[0]
        batches = Batches(
            (text[:PROBE_TOKENS].unsqueeze(0), text[:1].unsqueeze(0)),
            data=[stretch.token_ids for stretch in stretches],
            counted=[None] * len(stretches),
            tokens=batch_tokens,
        )
        inputs = stack.enter_context(
            open_layer_inputs(
                model,
                lambda tokens: batches,
                batch_tokens,
                onloader.run_layer,
                Decoder(forward, found.layers),
                evaluated.hidden,
                onloader.non_layer_weights_loaded,
            )
        )
        forward.is_keeping = True
        onloader.expect(inputs.layer_names if isinstance(inputs, ChainInputs) else ())
        yield _Pass(evaluated, inputs, forward, stretches)
