"""Runs the channel-by-channel part of error feedback as one Triton kernel (formulas: `rounding.py`).

Rows of the weight are independent of each other, channels are not. Each program keeps LEAF channels × BLOCK rows in
registers, selects one channel after another with a mask (registers cannot be indexed dynamically) and adds its error to
the channels after it. Without this kernel an accelerator launches about ten kernels for every input channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .feedback_state import FeedbackState

BLOCK_ROWS = 64


@triton.jit
def _nearest(x):
    """Rounds to the nearest integer, halves to even, as torch.round does."""
    up = tl.floor(x + 0.5)
    is_odd_tie = (up - x == 0.5) & (tl.floor(up * 0.5) * 2.0 != up)
    return tl.where(is_odd_tie, up - 1.0, up)


@triton.jit
def leaf_kernel(
    remaining, errors, squares, scale, zero, group_of_channel, coupling, pivots, start, channels, rows, coupling_stride,
    levels, LEAF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rounds channels start … start + channels of `rows` rows; `FeedbackState` describes the tensors."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < rows
    leaf = tl.arange(0, LEAF)
    offsets = (start + leaf)[:, None].to(tl.int64) * rows + column[None, :]
    tile = tl.load(remaining + offsets, mask=(leaf < channels)[:, None] & inside[None, :], other=0.0)
    total = tl.load(squares + column, mask=inside, other=0.0)
    for i in range(channels):
        channel = (start + i).to(tl.int64)
        group = tl.load(group_of_channel + channel)
        step = tl.load(scale + group * rows + column, mask=inside, other=1.0)
        offset = tl.load(zero + group * rows + column, mask=inside, other=0.0)
        target = tl.sum(tl.where((leaf == i)[:, None], tile, 0.0), axis=0)
        steps = tl.minimum(tl.maximum(_nearest(target / step), -offset), levels - offset)
        rounded = steps * step
        error = tl.load(errors + channel * rows + column, mask=inside, other=0.0) - rounded
        total += tl.load(pivots + channel) * (target - rounded) * (target - rounded)
        later = (leaf > i) & (leaf < channels)
        weights = tl.load(coupling + channel * coupling_stride + start + leaf, mask=later, other=0.0)
        tile += weights[:, None] * error[None, :]
        tl.store(remaining + channel * rows + column, steps + offset, mask=inside)
        tl.store(errors + channel * rows + column, error, mask=inside)
    tl.store(squares + column, total, mask=inside)


def round_leaf(
    state: FeedbackState,
    start: int,
    stop: int,
    levels: int,
) -> None:
    """Rounds channels start … stop in place."""
    rows = state.remaining.shape[1]
    with torch.cuda.device_of(state.remaining):  # Triton launches on the current device, whatever the tensors are on
        leaf_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            *state, start, stop - start, rows, state.coupling.stride(0), float(levels),
            LEAF=triton.next_power_of_2(stop - start), BLOCK=BLOCK_ROWS,
        )  # fmt: skip
