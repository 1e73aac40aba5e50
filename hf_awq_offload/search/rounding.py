"""Rounding to the grid: to the nearest integer, or with the error fed back into what is still to be rounded.

Error feedback is GPTQ's update (Frantar et al. 2023, arXiv:2210.17323, section 3) on the gram matrix that the scale search has already.
Input channels are rounded one after another; what rounding channel i does to the output is taken out of the channels
after it, as far as their inputs are correlated with its own:

    e_i = (w_i - ŵ_i) / U_ii,   w_j ← w_j - e_i U_ij  for j > i,   UᵀU = (G + λI)⁻¹,  U upper triangular

Channels are taken in the order of falling G_ii: errors of the loud ones can then still be made up for. The grid of every
group is fixed beforehand, from the weights as they are, so that the order leaves no trace in the checkpoint, which
stays a standard one ("static groups" in GPTQ implementations). Taking each group's grid when it is reached, in natural
order, was measured to be worse (docs/log.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NumericalError
from ..grid import Grid, GroupParameters, dequantize, quantize
from .scale import row_mse

BLOCK_CHANNELS = 128
"""Channels between two updates of all the later ones (GPTQ's lazy batches): most of the work is matrix products."""
DAMPING = 0.01
"""λ, relative to the mean of G's diagonal; it is multiplied by ten until the factorization succeeds."""
LARGEST_DAMPING = 1e3


class FeedbackOrder(NamedTuple):
    """What rounding all linears of one input shares."""

    channels: Tensor  # (in,) int64: input channels in the order in which they are rounded
    factor: Tensor  # (in, in) fp32: U, for channels in that order


def feedback_order(
    gram: Tensor,  # (in, in) fp32
) -> FeedbackOrder:
    """Order of the channels and the triangular factor of the damped inverse.

    Raises:
        NumericalError: the matrix can't be factorized even when strongly damped (it is not finite).
    """
    channels = torch.argsort(gram.diagonal(), descending=True, stable=True)
    ordered = gram[channels][:, channels]
    mean = ordered.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    damping = DAMPING
    while damping <= LARGEST_DAMPING:
        damped = ordered + torch.diag(damping * mean.expand(ordered.shape[0]))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed) and bool(torch.isfinite(factor).all()):
                return FeedbackOrder(channels, factor)
        damping *= 10
    raise NumericalError(
        f"A gram matrix of {gram.shape[0]} channels can't be factorized even with damping {LARGEST_DAMPING:g}; expected "
        "finite calibration activations. Use other calibration data, or rounding='nearest'."
    )


def round_weight(
    weight: Tensor,  # (out, in) fp32
    gram: Tensor,  # (in, in) fp32
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
    order: FeedbackOrder | None,  # None: to the nearest
) -> tuple[Tensor, Tensor]:
    """Codes (out, in) in fp32, and each row's squared output error per token, (out,).

    A row that error feedback does not improve is rounded to the nearest: the result is never worse than that.
    """
    codes = quantize(weight, parameters, grid)
    mse = row_mse(dequantize(codes, parameters, grid).sub_(weight), gram)
    if order is None:
        return codes, mse
    feedback_codes = round_with_feedback(weight, order, parameters, grid)
    feedback_mse = row_mse(dequantize(feedback_codes, parameters, grid).sub_(weight), gram)
    better = feedback_mse < mse
    return torch.where(better.unsqueeze(1), feedback_codes, codes), torch.where(better, feedback_mse, mse)


def round_with_feedback(
    weight: Tensor,  # (out, in) fp32
    order: FeedbackOrder,
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> Tensor:
    """Integers on the grid, (out, in) in fp32, that keep tr(D G Dᵀ) low. Rows are independent of each other."""
    group_of_channel = order.channels // grid.group_size
    remaining = weight.t()[order.channels].contiguous()  # (in, out), rounded from the top
    codes = torch.empty_like(remaining)
    scale, zero = (parameter.t().contiguous() for parameter in parameters)  # (n, out)
    for start in range(0, len(remaining), BLOCK_CHANNELS):
        block = slice(start, start + BLOCK_CHANNELS)
        groups = group_of_channel[block]
        codes[block], errors = _round_block(
            remaining[block], order.factor[block, block], scale[groups], zero[groups], grid.levels
        )
        later = slice(block.stop, None)
        remaining[later].addmm_(order.factor[block, later].t(), errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order.channels] = codes
    return in_place.t().contiguous()


def _round_block(
    rows: Tensor,  # (block, out): one input channel a row, changed in place
    factor: Tensor,  # (block, block) upper triangular
    scale: Tensor,  # (block, out)
    zero: Tensor,  # (block, out)
    levels: int,
) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors e of a block's channels, (block, out) each."""
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    pivots = factor.diagonal().tolist()
    for i, pivot in enumerate(pivots):
        code = torch.div(rows[i], scale[i], out=codes[i]).round_().add_(zero[i]).clamp_(0, levels)
        rounded = torch.sub(code, zero[i], out=errors[i]).mul_(scale[i])
        error = torch.sub(rows[i], rounded, out=errors[i]).div_(pivot)
        rows[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return codes, errors
