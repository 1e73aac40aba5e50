"""Rounds to the grid: to the nearest integer, or with each error fed back into the channels still to be rounded.

Error feedback is GPTQ (Frantar et al. 2023, arXiv:2210.17323) on the gram matrix that the scale search already has, in
the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6: the same codes), which needs no inverse. Input channels
are rounded one after another, each corrected for the output error that rounding the earlier ones caused:

    G + λI = (I + N) diag(c²) (I + N)ᵀ,  N strictly upper triangular
    w'_k = w_k + Σ_{j<k} (w_j - ŵ_j) N_jk,   ŵ_k = nearest to w'_k on the grid,   loss = Σ_k c_k² (w'_k - ŵ_k)²

The loss is least where the pivots are even: c_k² is the variance of channel k given the channels rounded after it. So
the order is built from its end, each time with the channel that has the least variance given those that come after it
(descending G_ii, GPTQ's "act order", is worse, and natural order worse still: docs/design/002). The grid of every group
is fixed beforehand from the original weights, so the order leaves no trace in the checkpoint, which stays a standard
one ("static groups" in GPTQ implementations). Afterwards the scales are fitted to the codes (refit.py) and the rows
are rounded once more with these scales; either is kept only where it lowers the error.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NumericalError
from ..formats.grid import Grid, GroupParameters, GroupRange, dequantize, group_parameters, group_range, quantize
from .chunks import at_once, row_chunks
from .feedback_state import FeedbackState
from .loss import row_mse
from .refit import refitted

LEAF_CHANNELS = 16
"""Channels that are rounded one by one between two matrix products."""
ROWS_ELEMENTS = 2**26
"""Weights that are rounded at once: 256 MiB for each fp32 temporary."""
DAMPING = 0.01
"""λ relative to the mean of G's diagonal; it is multiplied by ten until the factorization succeeds."""
LARGEST_DAMPING = 1e3
ORDER_BLOCKS = 32
"""Number of blocks in which channels are ordered; ordering them one by one would read the matrix once per channel."""


class FeedbackOrder(NamedTuple):
    """Channel order and factorization, shared by all linears that read one input."""

    channels: Tensor  # (in,) int64: input channels in the order in which they are rounded
    coupling: Tensor  # (in, in) fp32, contiguous: I + N, for channels in that order
    pivots: Tensor  # (in,) fp32: c², in that order
    damping: Tensor  # () fp32: λ


class RoundedWeight(NamedTuple):
    """A weight on the grid, with its error and the error of rounding to nearest."""

    codes: Tensor  # (out, in) fp32 integers
    mse: Tensor  # (out,) fp32, squared output error per token of every row
    parameters: GroupParameters  # (out, n)
    nearest_mse: Tensor  # (out,) mse of rounding to nearest on the full range
    improved: Tensor  # (out,) bool: rows that kept clipping and error feedback
    clip_ratio: Tensor | None  # (out, n) share of its full range that a group kept; None: no clipped ranges were given


def feedback_order(
    gram: Tensor,  # (in, in) fp32
) -> FeedbackOrder:
    """Returns the order of the channels and the unit triangular factor of the damped matrix.

    Raises:
        NumericalError: the matrix could not be factorized even when strongly damped (it is not finite).
    """
    backwards = _from_the_last(gram)
    # The upper factor of a matrix is the reversed lower factor of the reversed matrix.
    lower, damping = _damped_cholesky(gram.index_select(0, backwards).index_select(1, backwards), DAMPING)
    upper = lower.flip((0, 1)).contiguous()  # LAPACK's factors have contiguous columns
    diagonal = upper.diagonal().clone()
    return FeedbackOrder(backwards.flip(0), upper.div_(diagonal), diagonal.square(), damping)


def round_weight(
    weight: Tensor,  # (out, in) fp32
    gram: Tensor,  # (in, in) fp32
    grid: Grid,
    *,
    clipped: GroupRange | None = None,  # (out, n); None: the full range
    order: FeedbackOrder | None = None,  # None: round to nearest
    nearest_mse: Tensor | None = None,  # (out,) mse of rounding to nearest on the full range, if already known
) -> RoundedWeight:
    """Rounds a weight with error feedback (`order`) on `clipped` ranges, row by row where that helps.

    A row that the two together do not improve is rounded to nearest on its full range, so no row is worse than that.
    """
    full_range = group_range(weight, grid)
    full = group_parameters(full_range, grid)
    if order is None and clipped is None:
        codes, mse = _nearest(weight, gram, full, grid, nearest_mse)
        return RoundedWeight(codes, mse, full, mse, torch.zeros_like(mse, dtype=torch.bool), None)
    if nearest_mse is None:
        nearest_mse = _nearest(weight, gram, full, grid)[1]
    parameters = full if clipped is None else group_parameters(clipped, grid)
    if order is None:
        codes, mse = _nearest(weight, gram, parameters, grid)
    else:
        codes, mse, parameters = _round_and_refit(weight, gram, order, parameters, grid)
    improved = mse < nearest_mse
    clip_ratio = None if clipped is None else _ratio(clipped, full_range)
    worse = (~improved).nonzero().squeeze(1)
    if len(worse):
        own = _rows_of(full, worse)
        codes[worse], mse[worse] = _nearest(weight[worse], gram, own, grid, nearest_mse[worse])
        for ours, theirs in zip(parameters, own, strict=True):
            ours[worse] = theirs
        if clip_ratio is not None:
            clip_ratio[worse] = 1.0
    return RoundedWeight(codes, mse, parameters, nearest_mse, improved, clip_ratio)


def _round_and_refit(
    weight: Tensor,  # (out, in) fp32
    gram: Tensor,  # (in, in) fp32
    order: FeedbackOrder,
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> tuple[Tensor, Tensor, GroupParameters]:
    """Returns codes, mse and grid, each row the best of three: as rounded, with refitted scales, or rounded again."""
    codes, mse = round_with_feedback(weight, order, parameters, grid)
    fitting, change = refitted(weight, codes, parameters, gram, order.damping, grid)
    codes_again, mse_again = round_with_feedback(weight, order, fitting, grid)
    again = mse_again < torch.minimum(mse, mse + change)
    better = again | (change < 0)
    codes = torch.where(again[:, None], codes_again, codes)
    mse = torch.where(again, mse_again, torch.where(better, (mse + change).clamp_(min=0), mse))
    return codes, mse, GroupParameters(torch.where(better[:, None], fitting.scale, parameters.scale), parameters.zero)


def round_with_feedback(
    weight: Tensor,  # (out, in) fp32
    order: FeedbackOrder,
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Rounds to integers on the grid, (out, in) in fp32, that keep tr(D G Dᵀ) low, and returns the mse per row, (out,).

    Rows are independent of each other.
    """
    most_rows = max(1, at_once(ROWS_ELEMENTS) // weight.shape[1])
    parts = [
        _round_rows(rows, GroupParameters(*own), order, grid)
        for rows, *own in zip(weight.split(most_rows), *(part.split(most_rows) for part in parameters), strict=True)
    ]
    return torch.cat([codes for codes, _ in parts]), torch.cat([mse for _, mse in parts])


def _round_rows(
    weight: Tensor,  # (out, in) fp32
    parameters: GroupParameters,  # (out, n)
    order: FeedbackOrder,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    # Transposed first: gathering rows of a contiguous matrix is several times faster than gathering columns.
    errors = weight.t().contiguous().index_select(0, order.channels)  # (in, out): w, replaced by w - ŵ once rounded
    remaining = errors.clone()  # w', replaced by the codes once rounded
    squares = torch.zeros_like(errors[0])
    scale, zero = (part.t().contiguous() for part in parameters)  # (n, out)
    group_of_channel = order.channels // grid.group_size
    state = FeedbackState(remaining, errors, squares, scale, zero, group_of_channel, order.coupling, order.pivots)
    round_leaf = _round_leaf
    if weight.is_cuda and find_spec("triton") is not None:
        from .feedback_kernel import round_leaf

    spans = [(0, len(errors), False)]  # a stack, because a recursive closure would keep all these tensors alive
    while spans:
        start, stop, is_half_done = spans.pop()
        middle = (start + stop) // 2
        if stop - start <= LEAF_CHANNELS:
            round_leaf(state, start, stop, grid.levels)
        elif is_half_done:
            remaining[middle:stop].addmm_(order.coupling[start:middle, middle:stop].t(), errors[start:middle])
            spans.append((middle, stop, False))
        else:
            spans += [(start, stop, True), (start, middle, False)]
    mse = squares.sub_(errors.square().sum(dim=0).mul_(order.damping)).clamp_(min=0)
    codes = torch.empty_like(remaining).index_copy_(0, order.channels, remaining)
    return codes.t().contiguous(), mse


def _round_leaf(
    state: FeedbackState,
    start: int,
    stop: int,
    levels: int,
) -> None:
    """Rounds channels start … stop one by one, in place."""
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


def _from_the_last(
    gram: Tensor,  # (in, in) fp32
) -> Tensor:
    """Returns the channels, (in,) int64, in reverse rounding order.

    They are chosen in blocks: those that have the least variance given the channels before them. Where a block cannot
    be factorized, all channels are ordered by G_ii.
    """
    size = -(-len(gram) // ORDER_BLOCKS)
    rest = torch.arange(len(gram), device=gram.device)
    unexplained = gram.clone()  # the Schur complement: covariance given the channels in `chosen`
    unexplained.diagonal().add_(DAMPING * gram.diagonal().mean())
    chosen = []
    while len(rest) > size:
        by_variance = torch.argsort(unexplained.diagonal(), stable=True)
        quiet, others = by_variance[:size], by_variance[size:]
        rows = unexplained.index_select(0, quiet)
        factor, failed = torch.linalg.cholesky_ex(rows.index_select(1, quiet))
        if bool(failed):
            return torch.argsort(gram.diagonal(), stable=True)
        explaining = torch.linalg.solve_triangular(factor, rows.index_select(1, others), upper=False)
        chosen.append(rest[quiet])
        rest = rest[others]
        unexplained = unexplained.index_select(0, others).index_select(1, others)
        unexplained.addmm_(explaining.t(), explaining, alpha=-1)
    chosen.append(rest[torch.argsort(unexplained.diagonal(), stable=True)])
    return torch.cat(chosen)


def _damped_cholesky(
    gram: Tensor,  # (in, in) fp32
    damping: float,  # relative to the mean of the diagonal; multiplied by ten until the factorization succeeds
) -> tuple[Tensor, Tensor]:
    """Returns lower triangular L, (in, in), with L Lᵀ = G + λI, and λ, ().

    Raises:
        NumericalError: the matrix could not be factorized even when strongly damped (it is not finite).
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    while damping <= LARGEST_DAMPING:
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            return lower, damping * mean
        damping *= 10
    raise NumericalError(
        f"A gram matrix of {gram.shape[0]} channels could not be factorized even with damping {LARGEST_DAMPING:g}; "
        "expected finite calibration activations. Use other calibration data, or rounding='nearest'."
    )


def _nearest(
    weight: Tensor,  # (out, in) fp32
    gram: Tensor,  # (in, in)
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
    mse: Tensor | None = None,  # (out,) if already known
) -> tuple[Tensor, Tensor]:
    """Rounds to the nearest integers, (out, in), and returns them with the squared error per token per row, (out,)."""
    codes = torch.empty_like(weight)
    losses = torch.empty_like(weight[:, 0]) if mse is None else mse
    for span in row_chunks(weight):
        rows, own = weight[span], _rows_of(parameters, span)
        codes[span] = quantize(rows, own, grid)
        if mse is None:
            losses[span] = row_mse(dequantize(codes[span], own, grid).sub_(rows), gram)
    return codes, losses


def _rows_of(parameters: GroupParameters, rows: slice | Tensor) -> GroupParameters:
    return GroupParameters(parameters.scale[rows], parameters.zero[rows])


def _ratio(clipped: GroupRange, full: GroupRange) -> Tensor:
    """Returns the largest magnitude in each clipped range relative to the full range's, (out, n); 1 for zero groups."""
    ours, theirs = (torch.maximum(-ends.low, ends.high) for ends in (clipped, full))
    return torch.where(theirs > 0, ours / theirs, 1.0)
