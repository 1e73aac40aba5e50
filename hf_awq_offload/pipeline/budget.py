"""Plans the execution device's memory for one decoder layer: the micro-batch, and where the statistics are.

While statistics are collected, the device holds the layer's weights, the next layer's, the sums, and the activations of
a micro-batch. After that, the search's tensors take the place of the activations. The micro-batch takes what the rest
leaves. If not even a single sequence fits beside the sums, these go to RAM, and the device holds one gram matrix at a
time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..calibration.dataset import CalibrationSet
from ..config import AwqOffloadConfig
from ..model.decoder_layers import candidate_layers
from ..model.experts import expert_parts
from ..model.fused_experts import fused_experts
from ..model.linears import linears_in
from ..offload.devices import CPU, accelerator_bytes
from ..ops.blocks import matmul_dtype

FP32_BYTES = 4
WEIGHT_COPIES = 6
"""fp32 tensors of a linear's size that its search and rounding hold at once."""
GRAM_COPIES = 2
"""Gram matrices that they hold beside these: divided by the scale, and factorized."""
FACTORIZING_COPIES = 4
"""Gram matrices that exist while one is factorized."""
CPU_BATCH_TOKENS = 4096
"""Micro-batch on a CPU: large enough for full-speed matrix products, small beside any model."""
ACCELERATOR_MEMORY_SHARE = 0.25
"""Share of the accelerator's free memory that a micro-batch's activations may take if no limit is set."""

PROCESS_BYTES = 32 << 20
"""RAM for modules that are imported during a run, and for buffers that libraries keep (docs/log.md)."""


@dataclass(frozen=True)
class LayerSizes:
    """Bytes that the largest decoder layer takes, part by part."""

    weights: int
    computed_copy: int
    """A copy of the weights in the dtype that the device computes in; 0 if that is their own."""
    statistics: int
    largest_gram: int
    search: int
    activation_bytes_per_token: int

    @classmethod
    def of(cls, layers: Collection[nn.Module], device: torch.device) -> LayerSizes:
        """Returns the sizes of the largest of `layers`."""
        widest = max(layers, key=parameter_bytes)
        linears = linears_in(widest).values()
        dtype = next(widest.parameters()).dtype
        computed = matmul_dtype(device.type, dtype)
        weights = parameter_bytes(widest)
        width = computed.itemsize
        inputs = {(linear.in_features, linear.out_features) for linear in linears}
        grams = _gram_sizes(widest)
        return cls(
            weights=weights,
            computed_copy=0 if computed == dtype else weights // dtype.itemsize * width,
            statistics=sum(grams),
            largest_gram=max(grams),
            search=max(
                max(
                    WEIGHT_COPIES * FP32_BYTES * in_features * out_features + GRAM_COPIES * _gram_bytes(in_features),
                    FACTORIZING_COPIES * _gram_bytes(in_features),
                )
                for in_features, out_features in inputs
            ),
            activation_bytes_per_token=width * sum(linear.in_features + linear.out_features for linear in linears),
        )


@dataclass(frozen=True)
class Budget:
    """How a decoder layer is processed, and the memory that this takes on the execution device."""

    batch_tokens: int
    statistics_device: torch.device
    peak_bytes: int
    chunk_elements: int | None = None
    """Weights that the search works on at a time; None: as many as are fastest."""


def budget_of(
    model: nn.Module, recipe: AwqOffloadConfig, device: torch.device, calibration: CalibrationSet | None
) -> Budget:
    """Returns the budget that the recipe, the data and the machine allow; `device` is the execution device."""
    samples = [] if calibration is None else [sample.token_ids for sample in calibration.samples]
    sequences = [] if calibration is None else calibration.sequences
    free_bytes, total_bytes = (None, None) if device.type == "cpu" else accelerator_bytes(device)
    limit_bytes = recipe.memory_limit_bytes(device)
    if limit_bytes is not None and device.type == "cpu":
        limit_bytes = max(1, limit_bytes - PROCESS_BYTES - hidden_bytes(model, calibration))
    return budget_for(
        LayerSizes.of(candidate_layers(model).values(), device),
        device,
        prefetch=recipe.prefetch,
        longest_tokens=max(map(len, [*sequences, *samples]), default=0),
        total_tokens=0 if calibration is None else calibration.tokens,
        batch_tokens=recipe.batch_tokens,
        limit_bytes=limit_bytes,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
    )


def hidden_bytes(model: nn.Module, calibration: CalibrationSet | None) -> int:
    """Returns the bytes of the hidden states of all calibration tokens between two layers."""
    embeddings = cast(Any, model).get_input_embeddings().weight
    return 0 if calibration is None else calibration.tokens * embeddings.shape[-1] * embeddings.element_size()


def budget_for(
    sizes: LayerSizes,
    device: torch.device,  # the execution device
    *,
    prefetch: bool,
    longest_tokens: int,  # of a calibration sequence: a micro-batch has one at least
    total_tokens: int,
    batch_tokens: int | None = None,  # None: what there is room for
    limit_bytes: int | None = None,
    free_bytes: int | None = None,  # of an accelerator
    total_bytes: int | None = None,  # of an accelerator
) -> Budget:
    """Returns a micro-batch and a place for the statistics that keep to the limit as far as possible.

    The place depends on the limit, or on the accelerator's size, not on what happens to be free: it changes the order
    of sums, and a resumed run must repeat the order of the run before it.
    """
    held = sizes.weights * (1 + prefetch)

    def peak_bytes(tokens: int, place: torch.device) -> int:
        beside = sizes.statistics if place == device else sizes.largest_gram
        activations = max(min(tokens, total_tokens), longest_tokens) * sizes.activation_bytes_per_token
        return held + beside + max(activations + sizes.computed_copy, sizes.search)

    place = device
    most_bytes = limit_bytes if limit_bytes is not None else total_bytes
    if device.type != "cpu" and most_bytes is not None and peak_bytes(longest_tokens, device) > most_bytes:
        place = CPU
    if batch_tokens is None and limit_bytes is not None:
        beside = sizes.statistics if place == device else sizes.largest_gram
        room_bytes = limit_bytes - held - beside - sizes.computed_copy
        batch_tokens = max(1, room_bytes // sizes.activation_bytes_per_token)
        batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS) if device.type == "cpu" else batch_tokens
    elif batch_tokens is None and free_bytes is not None:
        batch_tokens = max(1, int(free_bytes * ACCELERATOR_MEMORY_SHARE) // sizes.activation_bytes_per_token)
    batch_tokens = batch_tokens or CPU_BATCH_TOKENS
    return Budget(batch_tokens, place, peak_bytes(batch_tokens, place))


def parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _gram_bytes(in_features: int) -> int:
    return FP32_BYTES * in_features**2


def _gram_sizes(layer: nn.Module) -> list[int]:
    """Returns the bytes of a layer's gram matrices: one for each distinct input, as far as shapes tell, and expert."""
    parts, linears = expert_parts(layer), linears_in(layer)
    shapes = {(linear.in_features, linear.out_features) for name, linear in linears.items() if name not in parts}
    sizes = [_gram_bytes(in_features) for in_features, _ in shapes]
    of_experts = {(part.expert_name, linears[name].in_features) for name, part in parts.items()}
    sizes += [_gram_bytes(in_features) for _, in_features in of_experts]
    for fused in fused_experts(layer).values():  # not taken apart yet
        sizes += map(_gram_bytes, fused.input_widths)
    return sizes
