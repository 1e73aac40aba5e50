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

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from ..formats.grid import Grid, quantize_dequantize
from ..transfers import sent
from .chunks import ACCELERATOR_ELEMENTS, at_once, row_chunks
from .feedback_ranking import feedback_losses
from .gram_matrix import Gram
from .loss import RowSample, row_mse
from .row_blocks import row_blocks
from .statistics import InputStatistics
from .waiting import Reading, side_by_side

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
    loss: float  # the same with the winner, at most identity_loss
    row_mse: Tensor  # (out_0 + out_1 + …,) fp32: squared output error per token of every row with the winner
    channel_scale: Tensor | None = None  # (in,) the winner's scale of every input channel; None for the identity
    candidates: int = 0  # scales that were compared with the identity


Storable = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps candidates (n, rows) to their effective values (n, rows) after they are folded into the producer's dtype, and to
whether they can be folded, (n,) bool."""


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
    storable: Storable | None = None,  # None: whatever the candidates are
) -> ScaleSearch:
    """Returns the best of `n_grid` candidates and the identity."""
    steps = scale_steps(
        weights, statistics, grids, n_grid=n_grid, duo_scaling=duo_scaling, row_of_channel=row_of_channel, rows=rows,
        with_feedback=with_feedback, storable=storable,
    )  # fmt: skip
    return side_by_side([steps])[0]


def scale_steps(
    weights: Sequence[Tensor],  # (out_i, in) each
    statistics: InputStatistics,
    grids: Sequence[Grid],
    *,
    n_grid: int,
    duo_scaling: bool,
    row_of_channel: Tensor,  # (in,)
    rows: int,
    with_feedback: bool = False,
    storable: Storable | None = None,
) -> Reading[ScaleSearch]:
    """Searches as `search_scale` does, a step at a time (waiting.py), so that several searches wait together.

    The search measures candidates as `storable` returns them, so that the scale that is used is the one that was
    measured.
    """
    gram = statistics.gram
    identity_mse = weights_mse(weights, grids, gram)
    row_scales, usable = torch.ones(0, rows, device=gram.device), torch.ones(0, dtype=torch.bool, device=gram.device)
    row_of_channel = sent(row_of_channel, gram.device)
    if n_grid > 0:
        x_mean = _pool(statistics.mean_abs, row_of_channel, rows)
        w_mean = _pool(mean_relative_magnitude(weights, grids), row_of_channel, rows) if duo_scaling else None
        row_scales, usable = scale_candidates(x_mean, w_mean, n_grid)
        if storable is not None:
            row_scales, fits = storable(row_scales)
            usable &= fits
    read = yield torch.cat([identity_mse.sum(dtype=torch.float64)[None], usable.double(), identity_mse.double()])
    identity_loss, can_be_used = float(read[0]), read[1 : n_grid + 1].bool().tolist()
    ones = torch.ones(rows, device=gram.device)
    without = ScaleSearch(ones, None, identity_loss, identity_loss, identity_mse, candidates=sum(can_be_used))
    numbers = [number for number in range(n_grid) if can_be_used[number]]
    if not numbers:
        return without
    samples = _row_samples(weights, grids, read[n_grid + 1 :])
    scales = row_scales.index_select(1, row_of_channel).unbind()
    tried = yield from _best(samples, gram, [scales[number] for number in numbers], with_feedback)
    for number in (numbers[position] for position in tried):
        mse = weights_mse(weights, grids, gram, scales[number])
        loss = float((yield mse.sum(dtype=torch.float64)[None]))
        if loss < identity_loss:
            row_scale, alpha = row_scales[number].clone(), number / n_grid
            return replace(
                without, row_scale=row_scale, alpha=alpha, loss=loss, row_mse=mse, channel_scale=scales[number].clone()
            )
    return without


def kept_elements(in_features: int) -> int:
    """Returns about how many fp32 numbers a search keeps between its steps: candidates and sampled rows."""
    return 2 * SAMPLE_ROWS * in_features


def _best(
    samples: Sequence[RowSample],
    gram: Gram,
    scales: Sequence[Tensor],  # (in,) each, for rising α
    with_feedback: bool,
) -> Reading[list[int]]:
    """Returns the scales to try, best first: with error feedback, the best for rounding to nearest is the fallback."""
    for_nearest = yield from _coarse_to_fine(samples, gram, scales)
    if not with_feedback:
        return [for_nearest]
    first = max(0, for_nearest - FEEDBACK_STEPS_DOWN)
    near = scales[first : for_nearest + FEEDBACK_STEPS_UP + 1]
    losses = (yield feedback_losses(samples, gram, scales[for_nearest], near)).tolist()
    return list(dict.fromkeys([first + losses.index(min(losses)), for_nearest]))


def _coarse_to_fine(samples: Sequence[RowSample], gram: Gram, scales: Sequence[Tensor]) -> Reading[int]:
    """Returns the scale with the least loss among every COARSE_STEP-th and the neighbours of the best two of these."""
    losses: dict[int, float] = {}

    def ranked(asked: Sequence[int]) -> Generator[Tensor, Tensor, None]:
        if asked:
            found = yield sampled_losses(samples, gram, [scales[position] for position in asked])
            losses.update(zip(asked, found.tolist(), strict=True))

    yield from ranked(range(0, len(scales), COARSE_STEP))
    windows = [
        range(max(0, best - COARSE_STEP + 1), min(len(scales), best + COARSE_STEP))
        for best in sorted(losses, key=losses.__getitem__)[:2]
    ]
    yield from ranked([position for position in dict.fromkeys(chain(*windows)) if position not in losses])
    return min(losses, key=losses.__getitem__)


def without_scale(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
    gram: Gram,
    rows: int,
) -> Reading[ScaleSearch]:
    """Returns the identity and its loss; a step at a time (waiting.py)."""
    mse = weights_mse(weights, grids, gram)
    loss = float((yield mse.sum(dtype=torch.float64)[None]))
    return ScaleSearch(torch.ones(rows, device=gram.device), None, loss, loss, mse)


def scale_candidates(
    x_mean: Tensor,  # (rows,)
    w_mean: Tensor | None,  # (rows,); None for plain scaling
    n_grid: int,
) -> tuple[Tensor, Tensor]:
    """Returns scales for α = 0, 1/n … (n-1)/n, (n_grid, rows), and which are finite and positive, (n_grid,) bool.

    Dead channels keep 1.
    """
    alphas = [step / n_grid for step in range(n_grid)]
    dead = x_mean == 0
    scales = _powers(x_mean, alphas)
    if w_mean is not None:
        scales = scales / (_powers(w_mean, [1 - alpha for alpha in alphas]) + SMALLEST_SCALE)
    scales = scales.clamp(min=SMALLEST_SCALE)
    largest = scales.masked_fill(dead, -torch.inf).amax(dim=1, keepdim=True)
    least = scales.masked_fill(dead, torch.inf).amin(dim=1, keepdim=True)
    scales = (scales / (largest * least).sqrt()).masked_fill(dead, 1.0)
    return scales, ((scales > 0) & (scales < torch.inf)).all(dim=1)


def _powers(
    values: Tensor,  # (rows,)
    exponents: Sequence[float],
) -> Tensor:
    """Returns values ** exponent for each exponent, (exponents, rows)."""
    if values.is_cpu:  # where the last bits depend on how values are laid out
        return torch.stack([values.pow(exponent) for exponent in exponents])
    return values.pow(sent(torch.tensor(exponents), values.device)[:, None])


def weights_mse(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
    gram: Gram,
    scale: Tensor | None = None,  # (in,)
) -> Tensor:
    """Returns the squared output error per token of rounding W·s to nearest for each row, (out_0 + out_1 + …,)."""
    return torch.cat([row_mse(_difference(rows, grid, scale), gram) for rows, grid in row_blocks(weights, grids)])


def _difference(
    rows: Tensor,  # (rows, in) fp32
    grid: Grid,
    scale: Tensor | None,  # (in,), or (candidates, 1, in)
) -> Tensor:
    """Returns D = Q(W·s)/s - W, (rows, in), or (candidates, rows, in)."""
    if scale is None:
        return quantize_dequantize(rows, grid).sub_(rows)
    return quantize_dequantize(rows * scale, grid).div_(scale).sub_(rows)


def _row_samples(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
    mse: Tensor,  # (out_0 + out_1 + …,) under the identity, on the CPU
) -> list[RowSample]:
    """Draws rows that give an unbiased estimate of the loss of a scale.

    A row is drawn with a probability proportional to its share of the identity's loss, and weighted by the inverse.
    """
    generator = torch.Generator().manual_seed(0)
    chance = _inclusion(mse.double(), SAMPLE_ROWS)
    drawn = torch.rand(len(chance), generator=generator, dtype=chance.dtype) < chance
    rows = [own.nonzero().squeeze(1) for own in drawn.split([len(weight) for weight in weights])]
    counts, device = [len(own) for own in rows], weights[0].device
    shares = sent(chance[drawn].reciprocal(), device).split(counts)
    samples = [
        RowSample(weight.index_select(0, own).float(), grid, share)
        for weight, grid, own, share in zip(
            weights, grids, sent(torch.cat(rows), device).split(counts), shares, strict=True
        )
        if len(own)  # a small weight may have no rows drawn
    ]
    return samples if device.type == "cpu" else _joined(samples)


def _joined(samples: Sequence[RowSample]) -> list[RowSample]:
    """Returns one sample for each grid."""
    of_grid: dict[Grid, list[RowSample]] = {}
    for sample in samples:
        of_grid.setdefault(sample.grid, []).append(sample)
    return [
        RowSample(torch.cat([part.rows for part in parts]), grid, torch.cat([part.share for part in parts]))
        for grid, parts in of_grid.items()
    ]


def sampled_losses(
    samples: Sequence[RowSample],
    gram: Gram,
    scales: Sequence[Tensor],  # (in,) each
) -> Tensor:
    """Estimates the loss of rounding W·s to nearest for each scale, (scales,) fp64.

    A CPU takes one scale at a time, an accelerator as many as fit.
    """
    losses = torch.zeros(len(scales), dtype=torch.float64, device=gram.device)
    for sample in samples:
        n_at_once = 1 if gram.is_cpu else max(1, at_once(ACCELERATOR_ELEMENTS) // sample.rows.numel())
        for start in range(0, len(scales), n_at_once):
            part = torch.stack([*scales[start : start + n_at_once]])
            for span in row_chunks(sample.rows):
                losses[start : start + n_at_once].add_(_share_of_losses(sample.part(span), gram, part))
    return losses


def _share_of_losses(
    sample: RowSample,
    gram: Gram,
    scales: Tensor,  # (scales, in)
) -> Tensor:
    """Returns what the rows add to the loss of each scale, (scales,) fp64."""
    difference = _difference(sample.rows, sample.grid, scales[:, None])
    mse = row_mse(difference.flatten(0, 1), gram).view(difference.shape[:2])
    return (mse * sample.share).sum(dim=1, dtype=torch.float64)


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


def mean_relative_magnitude(
    weights: Sequence[Tensor],  # (out_i, in) each
    grids: Sequence[Grid],
) -> Tensor:
    """Returns w̄, (in,): |W| relative to the largest in its group, averaged over the rows of all linears."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for rows, grid in row_blocks(weights, grids):
        groups = grid.groups(rows.abs())
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
