"""Ranks scales by their loss after rounding with error feedback.

Error feedback already corrects part of the error that a scale prevents, so it works best with milder scales than
rounding to nearest does (docs/design/004). All candidates are rounded together. In the units of a reference scale r,
with inputs x / r and weights W · r, a candidate s changes only the steps of the grid, to Δ · r_k / s_k for channel k.
So all candidates share one gram matrix, one channel order and one factorization.

The loss is measured on the damped matrix that error feedback uses. Without λ, the ranking would overfit to the
calibration text (KL 0.0092 instead of 0.0089 on the shipped model at 3 bits, docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..formats.grid import GroupParameters, group_parameters, group_range
from .chunks import ACCELERATOR_ELEMENTS, at_once
from .gram_matrix import Gram
from .loss import RowSample
from .rounding import FeedbackOrder, feedback_order, round_with_feedback

CPU_ELEMENTS = 2**20
"""Weights, over all candidates, that are rounded at once: 4 MiB for each of nine fp32 temporaries."""


def feedback_losses(
    samples: Iterable[RowSample],
    gram: Gram,
    reference: Tensor,  # (in,) a scale close to the best one
    candidates: Sequence[Tensor],  # (in,) each
) -> Tensor:
    """Returns the loss of rounding W·s with error feedback on full ranges, (candidates,) fp64 on the gram's device.

    The losses can be compared only with each other.

    Raises:
        NumericalError: the gram matrix could not be factorized.
    """
    order = feedback_order(gram, reference.reciprocal())
    order = order._replace(damping=torch.zeros_like(order.damping))  # keeps λ in the losses
    losses = torch.zeros(len(candidates), dtype=torch.float64, device=gram.device)
    most_elements = at_once(CPU_ELEMENTS if gram.device.type == "cpu" else ACCELERATOR_ELEMENTS)
    for sample in samples:
        n_at_once = max(1, most_elements // sample.rows.numel())
        for start in range(0, len(candidates), n_at_once):
            part = torch.stack([*candidates[start : start + n_at_once]])
            losses[start : start + len(part)].add_(_share_of_losses(sample, order, reference, part))
    return losses


def _share_of_losses(
    sample: RowSample,
    order: FeedbackOrder,
    reference: Tensor,  # (in,)
    candidates: Tensor,  # (candidates, in)
) -> Tensor:
    """Returns what the rows add to the loss of each candidate, (candidates,) fp64."""
    steps = _steps(sample, reference, candidates)
    weight = (sample.rows * reference).repeat(len(candidates), 1)
    _, damped_mse = round_with_feedback(weight, order, steps, replace(sample.grid, group_size=1))
    return (damped_mse.view(len(candidates), -1) * sample.share).sum(dim=1, dtype=torch.float64)


def _steps(
    sample: RowSample,
    reference: Tensor,  # (in,)
    candidates: Tensor,  # (candidates, in)
) -> GroupParameters:
    """Returns the grid of rows · scale per channel, in the units of the reference, (candidates · rows, in)."""
    scaled = sample.rows * candidates[:, None]  # (candidates, rows, in)
    step, zero = group_parameters(group_range(scaled, sample.grid), sample.grid)  # (candidates, rows, n)
    factors = sample.grid.groups(reference / candidates)[:, None]  # (candidates, 1, n, group_size)
    steps = (step.unsqueeze(-1) * factors).flatten(-2)
    zeros = zero.unsqueeze(-1).expand(*zero.shape, sample.grid.group_size).flatten(-2)
    return GroupParameters(steps.flatten(0, 1), zeros.flatten(0, 1))
