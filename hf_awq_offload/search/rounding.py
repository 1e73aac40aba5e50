"""Rounding to the grid: to the nearest integer, or with the error fed back into what is still to be rounded.

Error feedback is GPTQ (Frantar et al. 2023, arXiv:2210.17323) on the gram matrix that the scale search has already, in
the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6: the same codes), which needs no inverse. Input channels
are rounded one after another, each corrected for what rounding the earlier ones does to the output:

    G + λI = (I + N) diag(c²) (I + N)ᵀ,  N strictly upper triangular
    w'_k = w_k + Σ_{j<k} (w_j - ŵ_j) N_jk,   ŵ_k = nearest to w'_k on the grid,   loss = Σ_k c_k² (w'_k - ŵ_k)²

The loss is least where the pivots are even: c_k² is what channel k varies by once those rounded after it are known. So
the order is made from its end, each time of the channel that varies least given those that come after it (by falling
G_ii, GPTQ's "act order", is worse, natural order more so: docs/design/002). The grid of every group is fixed first,
from the weights as they are, so that the order leaves no trace in the checkpoint, which stays a standard one ("static
groups" in GPTQ implementations). Then scales are fitted to the codes (refit.py) and rows rounded once more on these, as
far as either lowers the error.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NumericalError
from ..formats.grid import Grid, GroupParameters, GroupRange, dequantize, group_parameters, group_range, quantize
from .feedback_state import FeedbackState
from .loss import row_chunks, row_mse
from .refit import refitted

LEAF_CHANNELS = 16
"""Channels rounded one by one between two matrix products."""
ROWS_ELEMENTS = 2**26
"""Weights that are rounded together: 256 MiB for each fp32 temporary."""
DAMPING = 0.01
"""λ, relative to the mean of G's diagonal; it is multiplied by ten until the factorization succeeds."""
LARGEST_DAMPING = 1e3
ORDER_BLOCKS = 32
"""Channels are put in order by so many blocks; one by one would read the matrix once for every channel."""


class FeedbackOrder(NamedTuple):
    """What rounding all linears of one input shares."""

    channels: Tensor  # (in,) int64: input channels in the order in which they are rounded, see the module's text
    coupling: Tensor  # (in, in) fp32, contiguous: I + N, for channels in that order
    pivots: Tensor  # (in,) fp32: c², in that order
    damping: Tensor  # () fp32: λ


class RoundedWeight(NamedTuple):
    """A weight on the grid, what that costs, and what was gained."""

    codes: Tensor  # (out, in) fp32 integers
    mse: Tensor  # (out,) fp32, squared output error per token of every row
    parameters: GroupParameters  # (out, n)
    nearest_mse: Tensor  # (out,) the same of rounding to the nearest on the full range
    improved: Tensor  # (out,) bool: rows that clipping and error feedback were kept for
    clip_ratio: Tensor | None  # (out, n) share of its full range that a group kept; None: no clipped ranges were given


def feedback_order(
    gram: Tensor,  # (in, in) fp32
) -> FeedbackOrder:
    """Order of the channels and the unit triangular factor of the damped matrix.

    Raises:
        NumericalError: the matrix can't be factorized even when strongly damped (it is not finite).
    """
    backwards = _from_the_last(gram)
    # The upper factor of a matrix is the lower one of the matrix in reversed order, reversed.
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
    order: FeedbackOrder | None = None,  # None: to the nearest
    nearest_mse: Tensor | None = None,  # (out,) of rounding to the nearest on the full range, where it is known
) -> RoundedWeight:
    """The weight rounded with error feedback (`order`) on `clipped` ranges, as far as that pays.

    A row that both together do not improve is rounded to the nearest on its full range: never worse than that.
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
    """Codes, mse, grid; of each row the best: as rounded, on scales fitted to the codes, or rounded again on these."""
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
    """Integers on the grid, (out, in) in fp32, that keep tr(D G Dᵀ) low, and that of each row, (out,).

    Rows are independent of each other.
    """
    most_rows = max(1, ROWS_ELEMENTS // weight.shape[1])
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
    # Transposed first: gathering rows of a contiguous matrix is several times faster than columns.
    errors = weight.t().contiguous().index_select(0, order.channels)  # (in, out), w - ŵ once rounded
    remaining = errors.clone()  # w', codes once rounded
    squares = torch.zeros_like(errors[0])
    scale, zero = (part.t().contiguous() for part in parameters)  # (n, out)
    group_of_channel = order.channels // grid.group_size
    state = FeedbackState(remaining, errors, squares, scale, zero, group_of_channel, order.coupling, order.pivots)
    round_leaf = _round_leaf
    if weight.is_cuda and find_spec("triton") is not None:
        from .feedback_kernel import round_leaf

    spans = [(0, len(errors), False)]  # a stack: no recursive closure, which would keep all these tensors alive
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
    """Round the channels start … stop one by one, in place."""
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
    """Channels, (in,) int64, by blocks of those that vary least given what is before them; by G_ii where that fails."""
    size = -(-len(gram) // ORDER_BLOCKS)
    rest = torch.arange(len(gram), device=gram.device)
    unexplained = gram.clone()  # the Schur complement: what channels vary by given those in `chosen`
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
    damping: float,  # relative to the mean of the diagonal; times ten until the factorization succeeds
) -> tuple[Tensor, Tensor]:
    """Lower L, (in, in), with L Lᵀ = G + λI, and λ, ().

    Raises:
        NumericalError: the matrix can't be factorized even when strongly damped (it is not finite).
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
        f"A gram matrix of {gram.shape[0]} channels can't be factorized even with damping {LARGEST_DAMPING:g}; "
        "expected finite calibration activations. Use other calibration data, or rounding='nearest'."
    )


def _nearest(
    weight: Tensor,  # (out, in) fp32
    gram: Tensor,  # (in, in)
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
    mse: Tensor | None = None,  # (out,) where it is known
) -> tuple[Tensor, Tensor]:
    """The nearest integers, (out, in), and the squared output error per token of every row, (out,)."""
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
    """The largest magnitude in each clipped range relative to that in the full one, (out, n); 1 for zeros."""
    ours, theirs = (torch.maximum(-ends.low, ends.high) for ends in (clipped, full))
    return torch.where(theirs > 0, ours / theirs, 1.0)
