"""Goes through the channels of a weight with error feedback (formulas: `rounding.py`).

Halves of the channels are coupled by one matrix product, and a leaf of few channels is rounded one by one: on a CPU by
a loop, on a GPU by a kernel (`feedback_kernel.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..triton_trial import triton_refusal
from .feedback_state import FeedbackState
from .large_products import add_product

LEAF_CHANNELS = 16
"""Channels that the loop rounds one by one between two matrix products."""


class Leaf(NamedTuple):
    """Channels between two matrix products, and what rounds them."""

    channels: int
    alignment: int  # a leaf starts at a multiple of this
    round: Callable[[FeedbackState, int, int, int], None]  # channels start … stop, in place; levels of the grid


def feed_back(
    state: FeedbackState,
    levels: int,  # the largest integer of the grid
) -> None:
    """Rounds all channels of `state` in place."""
    remaining, errors, coupling = state.remaining, state.errors, state.coupling
    leaf = _leaf_on(remaining.device)
    spans = [(0, len(errors), False)]  # a stack, because a recursive closure would keep all these tensors alive
    with torch.cuda.device_of(remaining):  # Triton launches on the current device, whatever the tensors are on
        while spans:
            start, stop, is_half_done = spans.pop()
            half = (stop - start) // 2 // leaf.alignment * leaf.alignment
            middle = start + max(half, leaf.alignment)
            if stop - start <= leaf.channels:
                leaf.round(state, start, stop, levels)
            elif is_half_done:
                add_product(remaining[middle:stop], coupling[start:middle, middle:stop].t(), errors[start:middle])
                spans.append((middle, stop, False))
            else:
                spans += [(start, stop, True), (start, middle, False)]


def _leaf_on(device: torch.device) -> Leaf:
    if device.type == "cuda" and triton_refusal(device) is None:
        from .feedback_kernel import BLOCK_CHANNELS, round_block

        return Leaf(BLOCK_CHANNELS, BLOCK_CHANNELS, round_block)
    return Leaf(LEAF_CHANNELS, 1, _round_one_by_one)


def _round_one_by_one(
    state: FeedbackState,
    start: int,
    stop: int,
    levels: int,
) -> None:
    """Rounds channels start … stop in place."""
    remaining, errors, squares, scale, zero, group_of_channel, coupling, pivots = state
    groups = group_of_channel[start:stop].tolist()
    for i, group, pivot in zip(range(start, stop), groups, pivots[start:stop].tolist(), strict=True):
        codes = (remaining[i] / scale[group]).round_().add_(zero[group]).clamp_(0, levels)
        rounded = (codes - zero[group]).mul_(scale[group])
        residual = remaining[i].sub_(rounded)
        squares.addcmul_(residual, residual, value=pivot)
        remaining[i] = codes
        errors[i].sub_(rounded)
        remaining[i + 1 : stop].addr_(coupling[i, i + 1 : stop], errors[i])
