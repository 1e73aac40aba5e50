"""Cuts calibration data into the batches that a model is run on: probes, micro-batches of text, samples one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.probe_memory import PROBE_TOKENS
from .dataset import CalibrationSet, micro_batches
from .forward_pass import ModelInputs, text_in, token_ids_of
from .text_decoder import Decoder, RunLayer, find_decoder

Probes = tuple[ModelInputs, ModelInputs]
"""Two short batches, of several tokens and of a single one. Layers are probed on them; they are no data."""


@dataclass(frozen=True)
class Batches:
    """The batches of one run, the probes first."""

    probes: Probes
    data: list[ModelInputs]
    counted: list[Tensor | None]
    """For each batch of `data`, which tokens enter the statistics, (batch, tokens) bool; None if all do."""
    tokens: int
    """The most tokens of a micro-batch, unless a single sequence is longer."""
    numbers: Sequence[Sequence[int]] = ()
    """For each batch of `data`, the numbers of its sequences: their places in the calibration set, samples last."""

    def __iter__(self) -> Iterator[ModelInputs]:
        yield from self.probes
        yield from self.data

    @property
    def sequences(self) -> list[int]:
        """Number of sequences of each batch of `data`."""
        return [len(token_ids_of(batch)) for batch in self.data]

    def numbers_of(self, index: int) -> Sequence[int]:
        """Returns the numbers of the sequences in a batch of `data`; none if they are not known."""
        return self.numbers[index] if self.numbers else ()

    @property
    def samples(self) -> list[int]:
        """Indices, probes counted, of the batches that are a processor's outputs."""
        return [index for index, batch in enumerate(self) if isinstance(batch, Mapping)]


def decoder_and_probes(model: nn.Module, calibration: CalibrationSet, run_layer: RunLayer) -> tuple[Decoder, Probes]:
    """Returns the decoder that is calibrated, and the probes for its layers.

    Raises:
        ModelStructureError: there is plain text, and the model does not run on that.
    """
    samples = [sample.inputs for sample in calibration.samples]
    decoder, runs_on_text = find_decoder(model, samples, run_layer, needs_text=bool(calibration.sequences))
    if not runs_on_text:  # then a sample has to do, and nothing is learned from a lone token
        smallest = min(samples, key=lambda inputs: token_ids_of(inputs).numel())
        return decoder, (smallest, smallest)
    text = calibration.sequences[0] if calibration.sequences else text_in(model, samples)
    return decoder, (text[:PROBE_TOKENS].unsqueeze(0), text[:1].unsqueeze(0))


def batches_of(calibration: CalibrationSet, probes: Probes, batch_tokens: int) -> Batches:
    """Cuts the data into micro-batches of at most `batch_tokens` tokens of text, and samples one by one."""
    indices = micro_batches(calibration, batch_tokens)
    texts = [torch.stack([calibration.sequences[i] for i in batch]) for batch in indices]
    counted = [_stack_counted(calibration, batch) for batch in indices]
    samples = calibration.samples
    after_text = len(calibration.sequences)
    return Batches(
        probes,
        data=[*texts, *(sample.inputs for sample in samples)],
        counted=[*counted, *(sample.counted for sample in samples)],
        tokens=batch_tokens,
        numbers=[*indices, *([after_text + index] for index in range(len(samples)))],
    )


def _stack_counted(calibration: CalibrationSet, indices: list[int]) -> Tensor | None:
    """Returns which tokens of a micro-batch enter the statistics, (batch, tokens) bool; None if all do."""
    masks = [calibration.counted[i] for i in indices]
    if all(mask is None for mask in masks):
        return None
    ones = torch.ones(calibration.sequences[indices[0]].shape[0], dtype=torch.bool)
    return torch.stack([ones if mask is None else mask for mask in masks])
