"""From calibration data to the batches that a model is run on: probes, micro-batches of text, samples by themselves."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from .data import CalibrationSet, micro_batches
from .decoder import Decoder, RunLayer, find_decoder
from .feeds import PROBES
from .inputs import ModelInputs, text_in, token_ids_of
from .linears import linears_in

PROBE_TOKENS = 32
CPU_BATCH_TOKENS = 4096
"""Micro-batch on a CPU: large enough for full-speed matrix products, small beside any model."""
ACCELERATOR_MEMORY_SHARE = 0.25
"""Share of the accelerator's free memory that a micro-batch's activations may take."""


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


def default_batch_tokens(layers: Collection[nn.Module], device: torch.device, limit_bytes: int | None = None) -> int:
    """Tokens of a micro-batch when the recipe leaves it open: what a share of the free memory holds.

    Args:
        layers: the decoder layers.
        device: the execution device.
        limit_bytes: use no more of the device's memory; a layer, the next one and the statistics go first.
    """
    if device.type == "cpu" and limit_bytes is None:
        return CPU_BATCH_TOKENS
    # Alive at once in a layer's forward: about every linear's output, and fp32 copies of the widest in norms.
    bytes_per_token = max(
        6 * sum(linear.out_features + linear.in_features for linear in linears_in(layer).values()) for layer in layers
    )
    if limit_bytes is None:
        free_bytes, _ = torch.accelerator.get_memory_info(device)
        return max(1, int(free_bytes * ACCELERATOR_MEMORY_SHARE) // bytes_per_token)
    batch_tokens = max(1, (limit_bytes - max(map(_fixed_bytes, layers))) // bytes_per_token)
    return min(batch_tokens, CPU_BATCH_TOKENS) if device.type == "cpu" else batch_tokens


def _fixed_bytes(layer: nn.Module) -> int:
    """Of a layer's weights, the next one's, and the statistics."""
    inputs = {(linear.in_features, linear.out_features) for linear in linears_in(layer).values()}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    return 2 * weights + sum(4 * in_features**2 for in_features, _ in inputs)


def _stack_counted(calibration: CalibrationSet, indices: list[int]) -> Tensor | None:
    """Which tokens of a micro-batch enter the statistics, (batch, tokens) bool; None when all do."""
    masks = [calibration.counted[i] for i in indices]
    if all(mask is None for mask in masks):
        return None
    ones = torch.ones(calibration.sequences[indices[0]].shape[0], dtype=torch.bool)
    return torch.stack([ones if mask is None else mask for mask in masks])
