"""Plans the execution device's memory for one decoder layer: how much of it is processed at a time, and what is where.

Beside the layer's weights and the next layer's, the device holds what structure probing, forward passes and the search
take, one after the other (`layer_sizes.py`). If that is too much, the run gives up first what costs least time:

    chunks          fewer weights at a time in the search, down to SMALL_CHUNK
    prefetch        the next layer's weights are read when it is their turn
    statistics      in RAM; the device holds one gram matrix at a time
    chunks          down to LEAST_ELEMENTS
    gram matrices   stay in RAM: the search reads them in blocks, once for each chunk; the device holds a factor alone

The micro-batch takes what the rest leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..calibration.dataset import CalibrationSet
from ..config import AwqOffloadConfig
from ..model.decoder_layers import candidate_layers
from ..offload.devices import CPU, accelerator_bytes
from ..search.chunks import ACCELERATOR_ELEMENTS, STACK_ELEMENTS
from .layer_sizes import LayerSizes
from .memory_pressure import BLOCKWISE_ELEMENTS, LEAST_ELEMENTS

CPU_BATCH_TOKENS = 4096
"""Micro-batch on a CPU: large enough for full-speed matrix products, small beside any model."""
ACCELERATOR_BATCH_TOKENS = 8192
"""Micro-batch on an accelerator: an estimate of where more tokens only take memory, until a card has measured it."""
ACCELERATOR_MEMORY_SHARE = 0.25
"""Share of the accelerator's free memory that a micro-batch's activations may take if no limit is set."""
SMALL_CHUNK = 2**20
"""Weights at a time, below which launches should take longer than reading the next layer: an estimate, too."""

PROCESS_BYTES = 32 << 20
"""RAM for modules that are imported during a run, and for buffers that libraries keep (docs/log.md)."""
SEGMENT_BYTES = 20 << 20
"""torch's allocator takes memory in pieces of this size for tensors of 1 to 10 MiB (c10, kLargeBuffer)."""
SMALL_SEGMENT_BYTES = 2 << 20
"""What it takes for smaller tensors (c10, kSmallBuffer)."""
FRAGMENTED = 1.15
"""What the allocator takes relative to what a search fills, on the simulated GPU (docs/gpu.md). A piece comes on top:
the next tensor of 1 to 10 MiB may need a whole one."""


@dataclass(frozen=True)
class Budget:
    """How a decoder layer is processed, and the memory that this takes on the execution device."""

    batch_tokens: int
    statistics_device: torch.device
    peak_bytes: int
    prefetch: bool
    chunk_elements: int | None
    """Weights that the search works on at a time; None: as many as are fastest."""
    grams_in_ram: bool = False
    """The search reads gram matrices from RAM, block by block."""


def budget_of(
    model: nn.Module, recipe: AwqOffloadConfig, device: torch.device, calibration: CalibrationSet | None
) -> Budget:
    """Returns the budget that the recipe, the data and the machine allow; `device` is the execution device."""
    samples = [] if calibration is None else [sample.token_ids for sample in calibration.samples]
    sequences = [] if calibration is None else calibration.sequences
    free_bytes, total_bytes = (None, None) if device.type == "cpu" else accelerator_bytes(device)
    limit_bytes = recipe.memory_limit_bytes(device)
    sizes = LayerSizes.of(candidate_layers(model).values(), device, recipe.group_size)
    if device.type == "cuda":
        limit_bytes, total_bytes = (
            None if most is None else tensor_bytes_within(most) for most in (limit_bytes, total_bytes)
        )
    elif limit_bytes is not None and device.type == "cpu":
        limit_bytes = max(1, limit_bytes - PROCESS_BYTES - hidden_bytes(model, calibration))
    budget = budget_for(
        sizes,
        device,
        prefetch=recipe.prefetch,
        longest_tokens=max(map(len, [*sequences, *samples]), default=0),
        total_tokens=0 if calibration is None else calibration.tokens,
        batch_tokens=recipe.batch_tokens,
        limit_bytes=limit_bytes,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
    )
    if device.type != "cuda":
        return budget
    return replace(budget, peak_bytes=reserved_bytes_of(budget, sizes))


def reserved_bytes_of(budget: Budget, sizes: LayerSizes) -> int:
    """Returns what torch's allocator takes from a card for the tensors that a budget counts.

    Prefetched layers come from a stream of their own, whose memory no other tensor can use.
    """
    weights_bytes = 2 * sizes.weights if budget.prefetch else 0
    own_bytes = int(FRAGMENTED * (budget.peak_bytes - weights_bytes)) + SEGMENT_BYTES
    return _in_pieces(own_bytes) + _in_pieces(weights_bytes)


def tensor_bytes_within(reserved_bytes: int) -> int:
    """Returns how many bytes of tensors fit for certain where the allocator may take so much from a card."""
    return max(1, int((reserved_bytes - 3 * SEGMENT_BYTES - 2 * SMALL_SEGMENT_BYTES) / FRAGMENTED))


def _in_pieces(allocated_bytes: int) -> int:
    if allocated_bytes == 0:
        return 0
    return -(-allocated_bytes // SEGMENT_BYTES) * SEGMENT_BYTES + SMALL_SEGMENT_BYTES


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
    """Returns a budget that keeps to the limit as far as possible.

    Where statistics are, and the size of chunks, depend on the limit, or on the accelerator's size, not on what happens
    to be free: they change the order of sums, and a resumed run must repeat the order of the run before it.
    """
    most_bytes = limit_bytes if limit_bytes is not None else total_bytes
    for choice in _choices(prefetch, device):
        if most_bytes is None or choice.peak_bytes(sizes, longest_tokens) <= most_bytes:
            break
    room_bytes = None
    if limit_bytes is not None:
        room_bytes = limit_bytes - choice.beside_activations_bytes(sizes)
    elif free_bytes is not None:
        room_bytes = int(free_bytes * ACCELERATOR_MEMORY_SHARE)
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
        if room_bytes is not None:
            batch_tokens = max(1, min(batch_tokens, room_bytes // sizes.activation_bytes_per_token))
    tokens = max(min(batch_tokens, total_tokens), longest_tokens)
    return Budget(
        batch_tokens,
        choice.statistics_device,
        choice.peak_bytes(sizes, tokens),
        choice.prefetch,
        choice.chunk_elements,
        choice.grams_in_ram,
    )


@dataclass(frozen=True)
class _Choice:
    """What may be given up to keep to a limit."""

    prefetch: bool
    statistics_device: torch.device
    chunk_elements: int | None
    device: torch.device
    grams_in_ram: bool = False

    def peak_bytes(self, sizes: LayerSizes, tokens: int) -> int:
        """Returns the most that is held on the device, in micro-batches of so many tokens."""
        forward = self.beside_activations_bytes(sizes) + tokens * sizes.activation_bytes_per_token
        from_ram = self.statistics_device != self.device
        search = self._held_bytes(sizes)
        if self.grams_in_ram:
            search += sizes.blockwise_search_bytes(cast(int, self.chunk_elements))
        else:
            search += self._statistics_bytes(sizes) + sizes.search_bytes(self.chunk_elements, from_ram)
        return max(self._held_bytes(sizes) + sizes.probing, forward, search)

    def beside_activations_bytes(self, sizes: LayerSizes) -> int:
        """Returns what is held during forward passes beside the activations."""
        return self._held_bytes(sizes) + self._statistics_bytes(sizes) + sizes.computed_copy

    def _held_bytes(self, sizes: LayerSizes) -> int:
        return sizes.weights * (1 + self.prefetch)

    def _statistics_bytes(self, sizes: LayerSizes) -> int:
        return sizes.statistics if self.statistics_device == self.device else sizes.largest_gram


def _choices(prefetch: bool, device: torch.device) -> Iterator[_Choice]:
    """Yields the choices, the cheapest first."""
    usual = None if device.type == "cpu" else ACCELERATOR_ELEMENTS
    sizes = [usual]
    elements = STACK_ELEMENTS if usual is None else usual
    while elements > LEAST_ELEMENTS:
        elements //= 2
        sizes.append(elements)
    large = [size for size in sizes if size is None or size >= SMALL_CHUNK]
    places = [device] if device.type == "cpu" else [device, CPU]
    for reads_ahead in sorted({prefetch, False}, reverse=True):
        yield from (_Choice(reads_ahead, device, size, device) for size in large)
    for place in places:
        yield from (_Choice(False, place, size, device) for size in sizes)
    if device.type == "cuda":
        blockwise = [size for size in sizes if cast(int, size) <= BLOCKWISE_ELEMENTS]
        yield from (_Choice(False, CPU, size, device, grams_in_ram=True) for size in blockwise)
