"""Searches for the per-channel scales of one input group (Lin et al. 2023, arXiv:2306.00978, section 3.2).

    s* = argmin_s  Σ over linears of tr(D G Dᵀ),   D = Q(W·s)/s - W,   G = the input's gram matrix

over a one-parameter family: s = x̄^α, or s = x̄^α / w̄^(1-α) with `duo_scaling`. x̄ is the mean magnitude of an input
channel, w̄ the mean magnitude of its weights relative to the largest in their group; s is normalized so that
√(max s · min s) = 1. The identity is always a candidate: under duo scaling α = 0 gives 1/w̄, not 1, and a search that
lacks the identity can do worse than rounding to nearest.

Candidates are ranked on a sample of the rows: first every COARSE_STEP-th α, then those around the best two. A few rows
cause most of the loss, so rows are drawn in proportion to their share of it under the identity (uniform sampling chose
scales that cost up to 1.5 times the best, docs/log.md). Where weights will be rounded with error feedback, the
candidates around the winner are then ranked by their loss with error feedback on the same rows (feedback_ranking.py).
Whether the chosen scale beats the identity under rounding to nearest is decided on all rows.

Where one producer row feeds several input channels (grouped queries), these share that row's scale: x̄ and w̄ are
first pooled over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.grid import Grid, quantize_dequantize
from .chunks import row_chunks
from .feedback_ranking import feedback_losses
from .loss import RowSample, row_mse
from .statistics import InputStatistics

SMALLEST_SCALE = 1e-4
SAMPLE_ROWS = 256
"""Expected number of rows, over all weights of a group, on which candidates are ranked."""
SMALLEST_SHARE = 0.05
"""Share of the mean added to every row's loss: a row without error under the identity may have some under a scale."""
COARSE_STEP = 3
FEEDBACK_STEPS_DOWN, FEEDBACK_STEPS_UP = 6, 2
"""Candidates below and above the best for rounding to nearest that are tried with error feedback, which prefers
smaller α."""


@dataclass(frozen=True)
class ScaleSearch:
    """The result of a search: the scale of every producer row, and the loss with and without it."""

    row_scale: Tensor  # (rows,) fp32; all ones when the identity won
    alpha: float | None  # exponent of the winner, None for the identity
    identity_loss: float  # mean squared output error of rounding to nearest without scales
    row_mse: Tensor  # (out_0 + out_1 + …,) fp32: squared output error per token of every row with the winner
    candidates: int = 0  # scales that were compared with the identity

    @property
    def loss(self) -> float:
        """Mean squared output error of rounding to nearest with the winner, at most identity_loss."""
        return float(self.row_mse.sum(dtype=torch.float64))


def search_scale(
    weights: Sequence[Tensor],  # (out_i, in) each: linears that share the input, any float dtype
    statistics: InputStatistics,
    grids: Sequence[Grid],  # one per weight
    *,
    n_grid: int,
    duo_scaling: bool,
    row_of_channel: Tensor,  # (in,) int64: producer row that feeds each channel
    rows: int,
    with_feedback: bool = False,  # for weights that will be rounded with error feedback
    storable: Callable[[Tensor], Tensor | None] = lambda row_scale: row_scale,
) -> ScaleSearch:
    """Returns the best of `n_grid` candidates and the identity.

    `storable` maps a candidate (rows,) to its effective value after it is folded into the producer's dtype, or to None
    if it cannot be folded. The search measures that value, so that the scale that is used is the one that was measured.
    """
    row_of_channel = row_of_channel.to(statistics.gram.device)
    without = without_scale(weights, grids, statistics.gram, rows)
    x_mean = _pool(statistics.mean_abs, row_of_channel, rows)
    w_mean = _pool(mean_relative_magnitude(weights, grids), row_of_channel, rows) if duo_scaling else None
    candidates = {}
    for alpha, candidate in scale_candidates(x_mean, w_mean, n_grid):
        row_scale = storable(candidate)
        if row_scale is not None:
            candidates[alpha] = row_scale
    if not candidates:
        return without
    samples = _row_samples(weights, grids, without.row_mse)
    scales = {alpha: row_scale[row_of_channel] for alpha, row_scale in candidates.items()}
    for alpha in _best(samples, statistics.gram, scales, with_feedback):
        mse = weights_mse(weights, grids, statistics.gram, scales[alpha])
        scaled = ScaleSearch(candidates[alpha], alpha, without.identity_loss, mse, len(candidates))
        if scaled.loss < without.loss:
            return scaled
    return replace(without, candidates=len(candidates))


def _best(
    samples: Sequence[RowSample],
    gram: Tensor,  # (in, in) fp32
    scales: Mapping[float, Tensor],  # α, in rising order -> (in,)
    with_feedback: bool,
) -> list[float]:
    """Returns the α to try, best first: with error feedback, the best for rounding to nearest follows as a fallback."""
    alphas = [*scales]
    for_nearest = _coarse_to_fine(alphas, lambda alpha: _sampled_loss(samples, gram, scales[alpha]))
    if not with_feedback:
        return [for_nearest]
    center = alphas.index(for_nearest)
    near = alphas[max(0, center - FEEDBACK_STEPS_DOWN) : center + FEEDBACK_STEPS_UP + 1]
    losses = feedback_losses(samples, gram, scales[for_nearest], [scales[alpha] for alpha in near])
    return list(dict.fromkeys([near[losses.index(min(losses))], for_nearest]))


def without_scale(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
    gram: Tensor,  # (in, in) fp32
    rows: int,
) -> ScaleSearch:
    """Returns the identity and its loss."""
    mse = weights_mse(weights, grids, gram)
    ones = torch.ones(rows, device=gram.device)
    return ScaleSearch(ones, None, float(mse.sum(dtype=torch.float64)), mse)


def scale_candidates(
    x_mean: Tensor,  # (rows,)
    w_mean: Tensor | None,  # (rows,); None for plain scaling
    n_grid: int,
) -> Iterator[tuple[float, Tensor]]:
    """Yields (α, scale (rows,)) for α = 0, 1/n … (n-1)/n; dead channels keep 1, and non-finite scales are skipped."""
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


def weights_mse(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
    gram: Tensor,  # (in, in) fp32
    scale: Tensor | None = None,  # (in,)
) -> Tensor:
    """Returns the squared output error per token of rounding W·s to nearest for each row, (out_0 + out_1 + …,)."""
    parts = [
        row_mse(_difference(weight[span].float(), grid, scale), gram)
        for weight, grid in zip(weights, grids, strict=True)
        for span in row_chunks(weight)
    ]
    return torch.cat(parts)


def _difference(
    rows: Tensor,  # (rows, in) fp32
    grid: Grid,
    scale: Tensor | None,  # (in,)
) -> Tensor:
    """Returns D = Q(W·s)/s - W, (rows, in)."""
    if scale is None:
        return quantize_dequantize(rows, grid).sub_(rows)
    return quantize_dequantize(rows * scale, grid).div_(scale).sub_(rows)


def _row_samples(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
    mse: Tensor,  # (out_0 + out_1 + …,) under the identity
) -> list[RowSample]:
    """Draws rows that give an unbiased estimate of the loss of a scale.

    A row is drawn with a probability proportional to its share of the identity's loss, and weighted by the inverse.
    """
    generator = torch.Generator().manual_seed(0)
    chance = _inclusion(mse.double().cpu(), SAMPLE_ROWS)
    drawn = torch.rand(len(chance), generator=generator, dtype=chance.dtype) < chance
    samples = []
    for weight, grid, own, p in zip(
        weights,
        grids,
        *(of_rows.split([len(weight) for weight in weights]) for of_rows in (drawn, chance)),
        strict=True,
    ):
        rows = own.nonzero().squeeze(1).to(weight.device)
        if len(rows):  # a small weight may have no rows drawn
            samples.append(RowSample(weight[rows].float(), grid, p[own].reciprocal().to(mse.device)))
    return samples


def _sampled_loss(
    samples: Sequence[RowSample],
    gram: Tensor,  # (in, in) fp32
    scale: Tensor,  # (in,)
) -> float:
    """Estimates the loss of rounding W·s to nearest."""
    loss = torch.zeros((), dtype=torch.float64, device=gram.device)
    for rows, grid, share in samples:
        for span in row_chunks(rows):
            mse = row_mse(_difference(rows[span], grid, scale), gram)
            loss += (mse * share[span]).sum(dtype=torch.float64)
    return float(loss)


def _inclusion(
    sizes: Tensor,  # (n,) fp64
    count: int,
) -> Tensor:
    """Returns the probability of drawing each item, (n,): proportional to its size, at most 1, summing to `count`."""
    if count >= len(sizes):
        return torch.ones_like(sizes)
    sizes = sizes + SMALLEST_SHARE * sizes.mean() + torch.finfo(sizes.dtype).tiny
    chance = torch.zeros_like(sizes)
    while True:  # items that are certain to be drawn leave less for the others
        sure = chance >= 1
        chance = torch.where(sure, 1.0, sizes * (count - int(sure.sum())) / sizes[~sure].sum())
        if not bool((chance > 1).any()):
            return chance


def _coarse_to_fine(alphas: Sequence[float], loss_of: Callable[[float], float]) -> float:
    """Returns the α with the least loss among every COARSE_STEP-th one and the neighbours of the best two of these."""
    losses = {alpha: loss_of(alpha) for alpha in alphas[::COARSE_STEP]}
    for best in sorted(losses, key=losses.__getitem__)[:2]:
        center = alphas.index(best)
        for alpha in alphas[max(0, center - COARSE_STEP + 1) : center + COARSE_STEP]:
            if alpha not in losses:
                losses[alpha] = loss_of(alpha)
    return min(losses, key=losses.__getitem__)


def mean_relative_magnitude(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
) -> Tensor:
    """Returns w̄, (in,): |W| relative to the largest in its group, averaged over the rows of all linears."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight, grid in zip(weights, grids, strict=True):
        for span in row_chunks(weight):
            groups = grid.groups(weight[span].float().abs())
            largest = groups.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
            total += (groups / largest).flatten(-2).sum(dim=0)
    return total / sum(weight.shape[0] for weight in weights)


def _pool(
    values: Tensor,  # (in,)
    row_of_channel: Tensor,  # (in,)
    rows: int,
) -> Tensor:
    """Averages `values` over the channels that each producer row feeds, (rows,); 0 for a row that feeds none."""
    sums = torch.zeros(rows, device=values.device).index_add_(0, row_of_channel, values)
    counts = torch.zeros(rows, device=values.device).index_add_(0, row_of_channel, torch.ones_like(values))
    return sums / counts.clamp(min=1)
