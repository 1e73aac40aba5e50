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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.grid import Grid, GroupParameters, GroupRange, dequantize, group_parameters, group_range, quantize
from .chunks import STACK_ELEMENTS, at_once, row_chunks
from .factorization import damped_factor, multiplied, reordered, reverse_order, reversed_in
from .factorization_in_place import factor_in_place, reverse_order_in_place, reversed_in_place
from .feedback import feed_back
from .feedback_state import FeedbackState
from .gram_matrix import Gram, GramInRam
from .loss import row_mse
from .refit import refitted


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
    gram: Gram,
    factors: Tensor | None = None,  # (in,): of the matrix whose rows and columns are multiplied by these
) -> FeedbackOrder:
    """Returns the order of the channels and the unit triangular factor of the damped matrix.

    Raises:
        NumericalError: the matrix could not be factorized even when strongly damped (it is not finite).
    """
    if isinstance(gram, GramInRam):
        return _order_in_place(gram, factors)
    here, there = gram.new_empty(gram.shape), gram.new_empty(gram.shape)
    backwards = reverse_order(gram, here, there, factors)
    # The upper factor of a matrix is the reversed lower factor of the reversed matrix.
    matrix = multiplied(reordered(gram, backwards, here), None if factors is None else factors[backwards])
    lower, damping = damped_factor(matrix, there)
    return _order_of(backwards, reversed_in(lower, here), damping)


def _order_in_place(gram: GramInRam, factors: Tensor | None) -> FeedbackOrder:
    """Does what `feedback_order` does in one buffer."""
    buffer = torch.empty(gram.shape, device=gram.device)
    backwards = reverse_order_in_place(gram, buffer, factors)
    lower, damping = factor_in_place(gram, backwards, buffer, factors)
    return _order_of(backwards, reversed_in_place(lower), damping)


def _order_of(
    backwards: Tensor,  # (in,) int64
    upper: Tensor,  # (in, in), overwritten
    damping: Tensor,  # ()
) -> FeedbackOrder:
    diagonal = upper.diagonal().clone()
    return FeedbackOrder(backwards.flip(0), upper.div_(diagonal), diagonal.square(), damping)


def round_weight(
    weight: Tensor,  # (out, in) fp32
    gram: Gram,
    grid: Grid,
    *,
    clipped: GroupRange | None = None,  # (out, n); None: the full range
    order: FeedbackOrder | None = None,  # None: round to nearest
    nearest_mse: Tensor | None = None,  # (out,) mse of rounding to nearest on the full range, if already known
) -> RoundedWeight:
    """Rounds a weight with error feedback (`order`) on `clipped` ranges, row by row where that helps.

    A row that the two together do not improve is rounded to nearest on its full range, so no row is worse than that.
    The host never waits for an accelerator.
    """
    full_range = group_range(weight, grid)
    full = group_parameters(full_range, grid)
    if nearest_mse is None:
        nearest_mse = _nearest_mse(weight, gram, full, grid)
    if order is None and clipped is None:
        none = torch.zeros_like(nearest_mse, dtype=torch.bool)
        return RoundedWeight(_nearest(weight, full, grid), nearest_mse, full, nearest_mse, none, None)
    parameters = full if clipped is None else group_parameters(clipped, grid)
    if order is None:
        codes, mse = _nearest(weight, parameters, grid), _nearest_mse(weight, gram, parameters, grid)
    else:
        codes, mse, parameters = _round_and_refit(weight, gram, order, parameters, grid)
    improved = mse < nearest_mse
    for span in row_chunks(weight):
        ours = improved[span, None]
        if weight.device.type != "cpu" or not bool(ours.all()):  # an accelerator is not waited for
            codes[span] = torch.where(ours, codes[span], quantize(weight[span], _rows_of(full, span), grid))
    return RoundedWeight(
        codes,
        torch.where(improved, mse, nearest_mse),
        GroupParameters(*(torch.where(improved[:, None], *pair) for pair in zip(parameters, full, strict=True))),
        nearest_mse,
        improved,
        None if clipped is None else torch.where(improved[:, None], _ratio(clipped, full_range), 1.0),
    )


def _round_and_refit(
    weight: Tensor,  # (out, in) fp32
    gram: Gram,
    order: FeedbackOrder,
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> tuple[Tensor, Tensor, GroupParameters]:
    """Returns codes, mse and grid, each row the best of three: as rounded, with refitted scales, or rounded again."""
    codes, mse, scale = torch.empty_like(weight), torch.empty_like(weight[:, 0]), torch.empty_like(parameters.scale)
    for span in _rows_at_once(weight):
        own = _rows_of(parameters, span)
        _round_and_refit_rows(weight[span], gram, order, own, grid, codes[span], mse[span], scale[span])
    return codes, mse, GroupParameters(scale, parameters.zero)


def _round_and_refit_rows(
    weight: Tensor,  # (rows, in) fp32
    gram: Gram,
    order: FeedbackOrder,
    parameters: GroupParameters,  # (rows, n)
    grid: Grid,
    codes: Tensor,  # (rows, in), filled
    mse: Tensor,  # (rows,), filled
    scale: Tensor,  # (rows, n), filled
) -> None:
    _round_rows(weight, order, parameters, grid, codes, mse)
    fitting, change = refitted(weight, codes, parameters, gram, order.damping, grid)
    codes_again, mse_again = torch.empty_like(weight), torch.empty_like(mse)
    _round_rows(weight, order, fitting, grid, codes_again, mse_again)
    fitted_mse = mse + change
    again = mse_again < torch.minimum(mse, fitted_mse)
    better = again | (change < 0)
    torch.where(again[:, None], codes_again, codes, out=codes)
    torch.where(again, mse_again, torch.where(better, fitted_mse.clamp_(min=0), mse), out=mse)
    torch.where(better[:, None], fitting.scale, parameters.scale, out=scale)


def round_with_feedback(
    weight: Tensor,  # (out, in) fp32
    order: FeedbackOrder,
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Rounds to integers on the grid, (out, in) in fp32, that keep tr(D G Dᵀ) low, and returns the mse per row, (out,).

    Rows are independent of each other.
    """
    codes, mse = torch.empty_like(weight), torch.empty_like(weight[:, 0])
    for span in _rows_at_once(weight):
        _round_rows(weight[span], order, _rows_of(parameters, span), grid, codes[span], mse[span])
    return codes, mse


def _rows_at_once(weight: Tensor) -> Iterator[slice]:
    rows = max(1, at_once(STACK_ELEMENTS) // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def _round_rows(
    weight: Tensor,  # (rows, in) fp32
    order: FeedbackOrder,
    parameters: GroupParameters,  # (rows, n)
    grid: Grid,
    codes: Tensor,  # (rows, in), filled
    mse: Tensor,  # (rows,), filled
) -> None:
    # Transposed first: gathering rows of a contiguous matrix is several times faster than gathering columns.
    errors = weight.t().contiguous().index_select(0, order.channels)  # (in, rows): w, replaced by w - ŵ once rounded
    remaining = errors.clone()  # w', replaced by the codes once rounded
    squares = torch.zeros_like(errors[0])
    scale, zero = (part.t().contiguous() for part in parameters)  # (n, rows)
    group_of_channel = order.channels // grid.group_size
    state = FeedbackState(remaining, errors, squares, scale, zero, group_of_channel, order.coupling, order.pivots)
    feed_back(state, grid.levels)
    torch.sub(squares, errors.square_().sum(dim=0).mul_(order.damping), out=mse).clamp_(min=0)
    in_place = errors.index_copy_(0, order.channels, remaining)
    codes.copy_(in_place.t())


def _nearest(
    weight: Tensor,  # (out, in) fp32
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> Tensor:
    """Returns the nearest integers, (out, in)."""
    codes = torch.empty_like(weight)
    for span in row_chunks(weight):
        codes[span] = quantize(weight[span], _rows_of(parameters, span), grid)
    return codes


def _nearest_mse(
    weight: Tensor,  # (out, in) fp32
    gram: Gram,
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> Tensor:
    """Returns the squared error per token of rounding each row to the nearest integers, (out,)."""
    mse = torch.empty_like(weight[:, 0])
    for span in row_chunks(weight):
        rows, own = weight[span], _rows_of(parameters, span)
        mse[span] = row_mse(dequantize(quantize(rows, own, grid), own, grid).sub_(rows), gram)
    return mse


def _rows_of(parameters: GroupParameters, rows: slice) -> GroupParameters:
    return GroupParameters(parameters.scale[rows], parameters.zero[rows])


def _ratio(clipped: GroupRange, full: GroupRange) -> Tensor:
    """Returns the largest magnitude in each clipped range relative to the full range's, (out, n); 1 for zero groups."""
    ours, theirs = (torch.maximum(-ends.low, ends.high) for ends in (clipped, full))
    return torch.where(theirs > 0, ours / theirs, 1.0)
