"""From calibration data to the batches that a model is run on: probes, micro-batches of text, samples by themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dataset import CalibrationSet, micro_batches
from .forward_pass import ModelInputs, text_in, token_ids_of
from .layer_inputs import PROBES
from .text_decoder import Decoder, RunLayer, find_decoder

PROBE_TOKENS = 32


def decoder_and_probes(
    model: nn.Module, calibration: CalibrationSet, run_layer: RunLayer
) -> tuple[Decoder, list[ModelInputs]]:
    """Which layers are calibrated, and the short batches that these are probed on: several tokens, and a single one."""
    samples = [sample.inputs for sample in calibration.samples]
    decoder, runs_on_text = find_decoder(model, samples, run_layer, needs_text=bool(calibration.sequences))
    if not runs_on_text:  # then a sample has to do, and nothing is learned from a lone token
        return decoder, [min(samples, key=lambda inputs: token_ids_of(inputs).numel())] * PROBES
    text = calibration.sequences[0] if calibration.sequences else text_in(model, samples)
    return decoder, [text[:PROBE_TOKENS].unsqueeze(0), text[:1].unsqueeze(0)]


def batches_of(calibration: CalibrationSet, batch_tokens: int) -> tuple[list[ModelInputs], list[Tensor | None]]:
    """Micro-batches of text, and every sample by itself; and which tokens of each count, (batch, tokens) bool."""
    indices = micro_batches(calibration, batch_tokens)
    texts = [torch.stack([calibration.sequences[i] for i in batch]) for batch in indices]
    counted = [_stack_counted(calibration, batch) for batch in indices]
    samples = calibration.samples
    return [*texts, *(sample.inputs for sample in samples)], [*counted, *(sample.counted for sample in samples)]


def _stack_counted(calibration: CalibrationSet, indices: list[int]) -> Tensor | None:
    """Which tokens of a micro-batch enter the statistics, (batch, tokens) bool; None when all do."""
    masks = [calibration.counted[i] for i in indices]
    if all(mask is None for mask in masks):
        return None
    ones = torch.ones(calibration.sequences[indices[0]].shape[0], dtype=torch.bool)
    return torch.stack([ones if mask is None else mask for mask in masks])
