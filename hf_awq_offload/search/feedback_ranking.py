"""Scales judged by what error feedback makes of them.

Error feedback makes up for part of what a scale is there to prevent, and so does best with milder ones than rounding to
nearest (docs/design/004). Candidates are rounded together: in the units of a reference scale r, that is on inputs x / r
and weights W · r, a candidate s changes nothing but the steps of the grid, which are Δ · r_k / s_k for channel k. All
share one gram matrix, one order of the channels and one factor.

The loss is that on the damped matrix, which error feedback works on; without λ it would favour what fits the
calibration text alone (KL 0.0092 instead of 0.0089 on the shipped model at 3 bits, docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..grid import Grid, GroupParameters, group_parameters, group_range
from .loss import RowSample
from .rounding import feedback_order, round_with_feedback

CPU_ELEMENTS = 2**21
"""Weights of all candidates that are rounded together: 8 MiB for each of a handful of fp32 temporaries."""
ACCELERATOR_ELEMENTS = 2**25


def feedback_losses(
    samples: Iterable[RowSample],
    gram: Tensor,  # (in, in) fp32
    reference: Tensor,  # (in,) a scale that is not far from the best
    candidates: Sequence[Tensor],  # (in,) each
) -> list[float]:
    """Of every candidate, the loss of rounding W·s with error feedback on full ranges; comparable with each other only.

    Raises:
        NumericalError: the gram matrix can't be factorized.
    """
    inverse = reference.reciprocal()
    order = feedback_order(gram * inverse[:, None] * inverse)
    order = order._replace(damping=torch.zeros_like(order.damping))  # which leaves λ in the losses
    losses = torch.zeros(len(candidates), dtype=torch.float64, device=gram.device)
    for sample in samples:
        most_elements = CPU_ELEMENTS if gram.device.type == "cpu" else ACCELERATOR_ELEMENTS
        at_once = max(1, most_elements // max(1, sample.rows.numel()))
        weight = sample.rows * reference
        grid = replace(sample.grid, group_size=1)
        for start in range(0, len(candidates), at_once):
            part = candidates[start : start + at_once]
            steps = [_steps(sample.rows, sample.grid, reference, scale) for scale in part]
            together = GroupParameters(*map(torch.cat, zip(*steps, strict=True)))
            _, damped_mse = round_with_feedback(weight.repeat(len(part), 1), order, together, grid)
            shares = damped_mse.view(len(part), -1) * sample.share
            losses[start : start + len(part)] += shares.sum(dim=1, dtype=torch.float64)
    return losses.tolist()


def _steps(
    rows: Tensor,  # (rows, in) fp32
    grid: Grid,
    reference: Tensor,  # (in,)
    scale: Tensor,  # (in,)
) -> GroupParameters:
    """The grid of rows · scale for every channel, in the units of the reference, (rows, in)."""
    scaled = rows * scale
    parameters = group_parameters(group_range(scaled, grid), grid)
    step, zero = (each.repeat_interleave(grid.group_size, dim=1) for each in parameters)
    return GroupParameters(step.mul_(reference / scale), zero)
