"""Search for the per-channel scales of one input group (Lin et al. 2023, arXiv:2306.00978, section 3.2).

    s* = argmin_s  Σ over linears of tr(D G Dᵀ),   D = Q(W·s)/s - W,   G = the input's gram matrix

over a one-parameter family: s = x̄^α, or with `duo_scaling` s = x̄^α / w̄^(1-α), x̄ the mean magnitude of an input
channel and w̄ that of its weights relative to their group's largest, normalized so that √(max s · min s) = 1.
The identity is always a candidate: under duo scaling α = 0 is 1/w̄, not 1, and a search without the identity can lose
to rounding to nearest.

Where several input channels are fed by one producer row (grouped queries), they share that row's scale: x̄ and w̄
are pooled over them first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import Grid, quantize_dequantize
from ..statistics import InputStatistics

SMALLEST_SCALE = 1e-4
CHUNK_ELEMENTS = 2**24
"""Weights that are widened to fp32 at a time: 64 MiB for each temporary."""


@dataclass(frozen=True)
class ScaleSearch:
    """Result: the scale of every producer row, and what it gains."""

    row_scale: Tensor  # (rows,) fp32; all ones when the identity won
    alpha: float | None  # exponent of the winner, None for the identity
    identity_loss: float  # mean squared output error of rounding to nearest without scales
    loss: float  # the same with the winner, ≤ identity_loss


def search_scale(
    weights: Sequence[Tensor],  # (out_i, in) each: linears that share the input, any float dtype
    statistics: InputStatistics,
    grids: Sequence[Grid],  # of each weight
    *,
    n_grid: int,
    duo_scaling: bool,
    row_of_channel: Tensor,  # (in,) int64: producer row that feeds each channel
    rows: int,
    storable: Callable[[Tensor], Tensor | None] = lambda row_scale: row_scale,
) -> ScaleSearch:
    """The best of `n_grid` candidates and the identity.

    `storable` says what a candidate (rows,) amounts to once it is folded into the producer's dtype, None if it can't
    be: candidates are judged by that, so that the scale which is used is the one that was measured.
    """
    row_of_channel = row_of_channel.to(statistics.gram.device)
    identity = torch.ones(rows, device=statistics.gram.device)
    identity_loss = output_mse(weights, statistics.gram, grids, identity[row_of_channel])
    best = ScaleSearch(identity, None, identity_loss, identity_loss)
    x_mean = _pool(statistics.mean_abs, row_of_channel, rows)
    w_mean = _pool(mean_relative_magnitude(weights, grids), row_of_channel, rows) if duo_scaling else None
    for alpha, candidate in scale_candidates(x_mean, w_mean, n_grid):
        row_scale = storable(candidate)
        if row_scale is None:
            continue
        loss = output_mse(weights, statistics.gram, grids, row_scale[row_of_channel])
        if loss < best.loss:
            best = ScaleSearch(row_scale, alpha, identity_loss, loss)
    return best


def scale_candidates(
    x_mean: Tensor,  # (rows,)
    w_mean: Tensor | None,  # (rows,); None for plain scaling
    n_grid: int,
) -> Iterator[tuple[float, Tensor]]:
    """(α, scale (rows,)) for α = 0, 1/n … (n-1)/n; dead channels keep 1, what is not finite is left out."""
    dead = x_mean == 0
    for step in range(n_grid):
        alpha = step / n_grid
        scale = x_mean.pow(alpha)
        if w_mean is not None:
            scale = scale / (w_mean.pow(1 - alpha) + SMALLEST_SCALE)
        scale = scale.clamp(min=SMALLEST_SCALE)
        if not bool(dead.all()):
            alive = scale[~dead]
            scale = scale / (alive.max() * alive.min()).sqrt()
        scale = torch.where(dead, torch.ones_like(scale), scale)
        if bool(torch.isfinite(scale).all()) and bool((scale > 0).all()):
            yield alpha, scale


def output_mse(
    weights: Sequence[Tensor],  # (out_i, in) each
    gram: Tensor,  # (in, in) fp32
    grids: Sequence[Grid],  # of each weight
    scale: Tensor,  # (in,)
) -> float:
    """Σ tr(D G Dᵀ) of rounding W·s to nearest: the squared output error per token, summed over output channels."""
    total = torch.zeros((), dtype=torch.float64, device=gram.device)
    for rows, grid in _chunks_with_grids(weights, grids):
        difference = quantize_dequantize(rows * scale, grid).div_(scale).sub_(rows)
        total += row_mse(difference, gram).sum(dtype=torch.float64)
    return float(total)


def row_mse(
    difference: Tensor,  # (rows, in) Ŵ - W
    gram: Tensor,  # (in, in)
) -> Tensor:
    """The diagonal of D G Dᵀ: squared output error per token of every output channel, (rows,)."""
    return (difference @ gram).mul_(difference).sum(dim=1)


def mean_relative_magnitude(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],  # of each weight
) -> Tensor:
    """w̄: per input channel, |W| relative to the largest of its group, averaged over the rows of all linears, (in,)."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for rows, grid in _chunks_with_grids(weights, grids):
        groups = grid.groups(rows.abs())
        largest = groups.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        total += (groups / largest).flatten(-2).sum(dim=0)
    return total / sum(weight.shape[0] for weight in weights)


def fp32_chunks(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Blocks of rows, (≤ rows, in) fp32, so that fp32 temporaries stay small beside the layer."""
    for weight in weights:
        for rows in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1])):
            yield rows.float()


def _chunks_with_grids(weights: Sequence[Tensor], grids: Sequence[Grid]) -> Iterator[tuple[Tensor, Grid]]:
    """As `fp32_chunks`, each block with the grid of its weight."""
    for weight, grid in zip(weights, grids, strict=True):
        for rows in fp32_chunks([weight]):
            yield rows, grid


def _pool(
    values: Tensor,  # (in,)
    row_of_channel: Tensor,  # (in,)
    rows: int,
) -> Tensor:
    """Mean over the channels that a producer row feeds, (rows,); 0 for a row that feeds none."""
    sums = torch.zeros(rows, device=values.device).index_add_(0, row_of_channel, values)
    counts = torch.zeros(rows, device=values.device).index_add_(0, row_of_channel, torch.ones_like(values))
    return sums / counts.clamp(min=1)
