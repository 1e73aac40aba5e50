"""Rounds a block of channels with error feedback in one Triton kernel (formulas: `rounding.py`).

Rows of the weight are independent of each other, channels are not. A thread has a row of its own, so none waits for
another. It takes INNER channels at a time into registers: first it corrects them for the errors of the block's earlier
channels, then it rounds one after another and corrects those after it. The loop over them is unrolled, because
registers cannot be indexed. Without this kernel an accelerator launches about ten kernels for every input channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_trial import LAUNCH_OPTIONS
from .feedback_state import FeedbackState

BLOCK_CHANNELS = 128
"""Channels per launch: between two launches, a matrix product applies the errors to later channels."""
INNER_CHANNELS = 16
BLOCK_ROWS = 32
"""Rows per program: one for each thread of a warp."""
UNROLLED = tl.constexpr(8)
HALF_EVEN = tl.constexpr(1.5 * 2**23)
"""Adding this to an fp32 number below 2²² and subtracting it again rounds to the nearest integer, halves to even."""


@triton.jit(do_not_specialize=["block", "rows"])
def block_kernel(
    remaining, errors, squares, scale, zero, group_of_channel, coupling, pivots, block, stop, rows, coupling_stride,
    levels, BLOCK: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rounds channels block * BLOCK … stop, at most BLOCK of them; `FeedbackState` describes the tensors.

    That `rows` is not specialized keeps the compiler from giving a thread several rows, and other threads a part of
    their channels.
    """
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < rows
    inner = tl.arange(0, INNER)
    start = block * BLOCK
    total = tl.load(squares + column, mask=inside, other=0.0)
    for first in range(0, tl.minimum(stop - start, BLOCK), INNER):
        channel = start + first + inner
        present = channel < stop
        mask = present[:, None] & inside[None, :]
        offsets = channel[:, None] * rows + column[None, :]
        target = tl.load(remaining + offsets, mask=mask, other=0.0)
        original = tl.load(errors + offsets, mask=mask, other=0.0)
        for done in tl.range(0, first, loop_unroll_factor=UNROLLED):
            earlier = start + done
            error = tl.load(errors + earlier * rows + column, mask=inside, other=0.0)
            weights = tl.load(coupling + earlier.to(tl.int64) * coupling_stride + channel, mask=present, other=0.0)
            target += weights[:, None] * error[None, :]
        group = tl.load(group_of_channel + channel, mask=present, other=0).to(tl.int32)
        steps = tl.load(scale + group[:, None] * rows + column[None, :], mask=mask, other=1.0)
        zeros = tl.load(zero + group[:, None] * rows + column[None, :], mask=mask, other=0.0)
        for i in tl.static_range(INNER):
            own = (inner == i)[:, None]
            one = start + first + i  # the channel
            weights = tl.load(coupling + one.to(tl.int64) * coupling_stride + channel, mask=present, other=0.0)
            pivot = tl.load(pivots + tl.minimum(one, stop - 1))  # an absent channel has no residual
            wanted = tl.sum(tl.where(own, target, 0.0), axis=0)
            step = tl.sum(tl.where(own, steps, 0.0), axis=0)
            offset = tl.sum(tl.where(own, zeros, 0.0), axis=0)
            # The bounds are integers, so it makes no difference that they are applied before rounding.
            integers = tl.minimum(tl.maximum(tl.div_rn(wanted, step), -offset), levels - offset)
            integers = (integers + HALF_EVEN) - HALF_EVEN
            residual = wanted - integers * step
            total += pivot * residual * residual
            error = tl.sum(tl.where(own, original, 0.0), axis=0) - integers * step
            target = tl.where((inner > i)[:, None], target + weights[:, None] * error[None, :], target)
            # Storing here also keeps the compiler from loading what all later channels need at once.
            place = one * rows + column
            written = column < tl.where(one < stop, rows, 0)
            tl.store(remaining + place, integers + offset, mask=written)
            tl.store(errors + place, error, mask=written)
        tl.debug_barrier()  # other channels read these errors
    tl.store(squares + column, total, mask=inside)


def round_block(
    state: FeedbackState,
    start: int,  # a multiple of BLOCK_CHANNELS
    stop: int,
    levels: int,
) -> None:
    """Rounds channels start … stop in place, at most BLOCK_CHANNELS of them, on the current device."""
    rows = state.remaining.shape[1]
    block_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        *state, start // BLOCK_CHANNELS, stop, rows, state.coupling.stride(0), float(levels),
        BLOCK=BLOCK_CHANNELS, INNER=INNER_CHANNELS, ROWS=BLOCK_ROWS, num_warps=1, **LAUNCH_OPTIONS,
    )  # fmt: skip
