"""Tests the searches against loops over explicit inputs, and that they are never worse than rounding to nearest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hf_awq_offload.search.chunks
import hf_awq_offload.search.clip
import hf_awq_offload.search.scale
from hf_awq_offload.formats.grid import Grid, GroupRange, dequantize, group_parameters, group_range, quantize_dequantize
from hf_awq_offload.search.clip import STEP, STEPS, search_clip
from hf_awq_offload.search.rounding import round_weight
from hf_awq_offload.search.scale import SMALLEST_SCALE, ScaleSearch, scale_candidates, search_scale
from hf_awq_offload.search.statistics import InputStatistics

GROUP, IN = 8, 24
GRID = Grid(4, GROUP, True)
GRIDS = pytest.mark.parametrize("grid", [GRID, Grid(4, GROUP, False), Grid(3, IN, True)], ids=str)
DUO = pytest.mark.parametrize("duo_scaling", [True, False], ids=["duo", "plain"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics_of(x: Tensor) -> InputStatistics:
    return InputStatistics(x.t() @ x / x.shape[0], x.abs().mean(dim=0), x.shape[0])


def explicit_mse(x: Tensor, weight: Tensor, replacement: Tensor) -> Tensor:
    """Returns the squared output error per token of every output channel, (out,) fp64, from the inputs themselves."""
    return (x.double() @ (replacement.double() - weight.double()).t()).square().mean(dim=0)


def explicit_loss(x: Tensor, weights: Sequence[Tensor], scale: Tensor, grid: Grid) -> float:
    total = 0.0
    for weight in weights:
        total += float(explicit_mse(x, weight, quantize_dequantize(weight * scale, grid) / scale).sum())
    return total


def outlier_input(seed: int, tokens: int = 64) -> Tensor:
    """Returns correlated inputs whose channels differ widely in magnitude."""
    noise = torch.randn(tokens, IN, generator=generator(seed)) @ torch.randn(IN, IN, generator=generator(seed + 1))
    return noise * torch.exp(1.5 * torch.randn(IN, generator=generator(seed + 2)))


def random_weights(seed: int, rows: Sequence[int] = (16, 5)) -> list[Tensor]:
    return [torch.randn(out, IN, generator=generator(seed + i)) * 0.1 for i, out in enumerate(rows)]


def run_search(
    x: Tensor,
    weights: Sequence[Tensor],
    grid: Grid = GRID,
    n_grid: int = 20,
    duo_scaling: bool = True,
    row_of_channel: Tensor | None = None,
    rows: int = IN,
    smallest: Tensor | None = None,
) -> ScaleSearch:
    """Runs `search_scale`; with `smallest` (rows,), a candidate below it in any row counts as not storable."""

    def storable(row_scales: Tensor) -> tuple[Tensor, Tensor]:
        return row_scales, torch.ones(len(row_scales), dtype=torch.bool) if smallest is None else (
            row_scales >= smallest
        ).all(dim=1)

    return search_scale(
        weights,
        statistics_of(x),
        [grid] * len(weights),
        n_grid=n_grid,
        duo_scaling=duo_scaling,
        row_of_channel=torch.arange(IN) if row_of_channel is None else row_of_channel,
        rows=rows,
        storable=storable,
    )


def reference_candidates(
    x: Tensor, weights: Sequence[Tensor], grid: Grid, n_grid: int, duo_scaling: bool, row_of_channel: Tensor, rows: int
) -> list[tuple[float | None, Tensor]]:
    """Returns (α, row scale) by the paper's formulas, channel by channel; the identity comes first, with α None."""
    relative = [[] for _ in range(rows)]
    magnitude = [[] for _ in range(rows)]
    for channel in range(x.shape[1]):
        row = int(row_of_channel[channel])
        magnitude[row].append(float(x[:, channel].abs().double().mean()))
        start = channel - channel % grid.group_size
        values = []
        for weight in weights:
            for w in weight:
                largest = float(w[start : start + grid.group_size].abs().max())
                values.append(abs(float(w[channel])) / largest if largest else 0.0)
        relative[row].append(sum(values) / len(values))
    mean = lambda values: sum(values) / len(values) if values else 0.0  # noqa: E731
    found: list[tuple[float | None, Tensor]] = [(None, torch.ones(rows))]
    for step in range(n_grid):
        alpha = step / n_grid
        scale = {}
        for row in range(rows):
            if mean(magnitude[row]) > 0:
                s = mean(magnitude[row]) ** alpha
                if duo_scaling:
                    s /= mean(relative[row]) ** (1 - alpha) + SMALLEST_SCALE
                scale[row] = max(s, SMALLEST_SCALE)
        norm = (max(scale.values()) * min(scale.values())) ** 0.5 if scale else 1.0
        found.append((alpha, torch.tensor([scale.get(row, norm) / norm for row in range(rows)])))
    return found


@pytest.fixture
def exhaustive(monkeypatch):
    """Makes the search try every candidate, as the reference loops do."""
    monkeypatch.setattr(hf_awq_offload.search.scale, "COARSE_STEP", 1)
    monkeypatch.setattr(hf_awq_offload.search.clip, "COARSE_STEP", 1)


@pytest.mark.usefixtures("exhaustive")
@DUO
@GRIDS
@pytest.mark.parametrize("seed", [0, 1])
def test_the_scale_is_the_best_of_a_loop_over_candidates_with_explicit_inputs(seed, grid, duo_scaling):
    x, weights = outlier_input(seed), random_weights(seed)
    search = run_search(x, weights, grid, duo_scaling=duo_scaling)
    candidates = reference_candidates(x, weights, grid, 20, duo_scaling, torch.arange(IN), IN)
    losses = {alpha: explicit_loss(x, weights, scale, grid) for alpha, scale in candidates}
    assert search.identity_loss == pytest.approx(losses[None], rel=1e-3)
    assert search.loss == pytest.approx(min(losses.values()), rel=1e-3)
    assert losses[search.alpha] <= min(losses.values()) * (1 + 1e-3)
    torch.testing.assert_close(search.row_scale, dict(candidates)[search.alpha], rtol=1e-4, atol=0)


def test_the_search_gains_on_inputs_with_outlier_channels():
    """Rules out that the tests above pass only because the identity always wins."""
    x, weights = outlier_input(0), random_weights(0)
    search = run_search(x, weights)
    assert search.alpha is not None
    assert search.loss < 0.8 * search.identity_loss


def adversarial() -> dict[str, tuple[Tensor, list[Tensor]]]:
    x, weights = outlier_input(0), random_weights(0)
    dead, huge, mostly_dead = x.clone(), x.clone(), torch.zeros_like(x)
    dead[:, ::3] = 0
    huge[:, 5] *= 1e6
    mostly_dead[:, 7] = x[:, 7]
    zero_column = [weight.clone() for weight in weights]
    for weight in zero_column:
        weight[:, 4] = 0
    outlier_weight = [weight.clone() for weight in weights]
    outlier_weight[0][3, 9] = 1e3
    return {
        "dead channels": (dead, weights),
        "all channels dead": (torch.zeros_like(x), weights),
        "one live channel": (mostly_dead, weights),
        "one huge channel": (huge, weights),
        "tiny inputs": (x * 1e-12, weights),
        "large inputs": (x * 1e10, weights),
        "constant input": (torch.ones_like(x), weights),
        "constant input per channel": (x[:1].expand(64, -1).contiguous(), weights),
        "a single token": (x[:1], weights),
        "zero weights": (x, [torch.zeros_like(weight) for weight in weights]),
        "a zero column": (x, zero_column),
        "an outlier weight": (x, outlier_weight),
        "constant weights": (x, [torch.full_like(weight, 0.3) for weight in weights]),
        "tiny weights": (x, [weight * 1e-9 for weight in weights]),
        "one row": (x, [weights[0][:1]]),
        "one row, one token": (x[:1], [weights[0][:1]]),
        "half precision": (x, [weight.bfloat16() for weight in weights]),
    }


@DUO
@GRIDS
@pytest.mark.parametrize(("x", "weights"), [pytest.param(*case, id=name) for name, case in adversarial().items()])
def test_the_search_never_loses_to_the_identity(x, weights, grid, duo_scaling):
    search = run_search(x, weights, grid, duo_scaling=duo_scaling)
    assert bool(torch.isfinite(search.row_scale).all())
    assert bool((search.row_scale > 0).all())
    assert search.loss <= search.identity_loss
    assert (search.alpha is None) == bool((search.row_scale == 1).all())
    weights = [weight.float() for weight in weights]
    found = explicit_loss(x, weights, search.row_scale, grid)
    assert found <= explicit_loss(x, weights, torch.ones(IN), grid) * (1 + 1e-4)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), n_grid=st.integers(0, 6), duo_scaling=st.booleans(), tokens=st.integers(1, 40))
def test_the_search_never_loses_to_the_identity_on_any_input(seed, n_grid, duo_scaling, tokens):
    x, weights = outlier_input(seed, tokens), random_weights(seed, rows=(3,))
    search = run_search(x, weights, n_grid=n_grid, duo_scaling=duo_scaling)
    assert search.loss <= search.identity_loss
    found = explicit_loss(x, weights, search.row_scale, GRID)
    assert found <= explicit_loss(x, weights, torch.ones(IN), GRID) * (1 + 1e-4)


def test_without_candidates_the_identity_is_the_result():
    search = run_search(outlier_input(0), random_weights(0), n_grid=0)
    assert search.alpha is None
    assert torch.equal(search.row_scale, torch.ones(IN))
    assert search.loss == search.identity_loss > 0


def test_inputs_and_weights_are_left_as_they_were():
    x, weights = outlier_input(0), random_weights(0)
    statistics = statistics_of(x)
    before = [tensor.clone() for tensor in (statistics.gram, statistics.mean_abs, *weights)]
    rows = torch.arange(IN)
    search_scale(weights, statistics, [GRID] * len(weights), n_grid=5, duo_scaling=True, row_of_channel=rows, rows=IN)
    search_clip(weights[0], statistics.gram, GRID)
    after = (statistics.gram, statistics.mean_abs, *weights)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(after, before, strict=True))


GROUPED = torch.arange(IN) % 6 + 6 * (torch.arange(IN) // 12)
"""Producer row of each channel, as with grouped queries: 12 of 14 rows feed two channels each, rows 12 and 13 none."""


@pytest.mark.usefixtures("exhaustive")
@DUO
@pytest.mark.parametrize("seed", [0, 1])
def test_channels_of_one_row_share_a_scale_found_from_their_means(seed, duo_scaling):
    x, weights = outlier_input(seed), random_weights(seed)
    search = run_search(x, weights, duo_scaling=duo_scaling, row_of_channel=GROUPED, rows=14)
    assert search.row_scale.shape == (14,)
    assert search.row_scale[12:].tolist() == [1, 1]
    candidates = reference_candidates(x, weights, GRID, 20, duo_scaling, GROUPED, 14)
    losses = {alpha: explicit_loss(x, weights, scale[GROUPED], GRID) for alpha, scale in candidates}
    assert search.loss == pytest.approx(min(losses.values()), rel=1e-3)
    torch.testing.assert_close(search.row_scale, dict(candidates)[search.alpha], rtol=1e-4, atol=0)


@pytest.mark.usefixtures("exhaustive")
@DUO
def test_candidates_that_can_not_be_stored_are_not_taken(duo_scaling):
    x, weights = outlier_input(0), random_weights(0)
    candidates = reference_candidates(x, weights, GRID, 20, duo_scaling, torch.arange(IN), IN)
    losses = {alpha: explicit_loss(x, weights, scale, GRID) for alpha, scale in candidates}
    minima = {alpha: float(scale.min()) for alpha, scale in candidates}
    free = run_search(x, weights, duo_scaling=duo_scaling)
    bound = float(free.row_scale.min()) * 1.001
    search = run_search(x, weights, duo_scaling=duo_scaling, smallest=torch.full((IN,), bound))
    allowed = {alpha: loss for alpha, loss in losses.items() if alpha is None or minima[alpha] >= bound}
    assert free.alpha not in allowed
    assert len(allowed) > 1
    assert search.loss == pytest.approx(min(allowed.values()), rel=1e-3)


def test_one_row_below_its_own_bound_rejects_a_candidate():
    x, weights = outlier_input(0), random_weights(0)
    free = run_search(x, weights)
    smallest = torch.zeros(IN)
    smallest[3] = float(free.row_scale[3]) * 1.001
    assert run_search(x, weights, smallest=smallest).alpha != free.alpha
    smallest[3] = float(free.row_scale[3])
    assert run_search(x, weights, smallest=smallest).alpha == free.alpha


def test_candidates_are_judged_as_they_are_stored():
    """Stores scales as powers of two: the result is one of these, with its actual loss."""
    x, weights = outlier_input(0), random_weights(0)
    search = search_scale(
        weights,
        statistics_of(x),
        [GRID] * len(weights),
        n_grid=20,
        duo_scaling=True,
        row_of_channel=torch.arange(IN),
        rows=IN,
        storable=lambda row_scales: (row_scales.log2().round().exp2(), torch.ones(20, dtype=torch.bool)),
    )
    assert torch.equal(search.row_scale, search.row_scale.log2().round().exp2())
    assert search.loss == pytest.approx(explicit_loss(x, weights, search.row_scale, GRID), rel=1e-3)


@DUO
def test_linears_of_one_input_may_have_grids_of_their_own(duo_scaling):
    x, weights = outlier_input(0), random_weights(0)
    grids = [Grid(3, GROUP, True), Grid(8, IN, False)]
    search = search_scale(
        weights,
        statistics_of(x),
        grids,
        n_grid=20,
        duo_scaling=duo_scaling,
        row_of_channel=torch.arange(IN),
        rows=IN,
    )
    expected = sum(explicit_loss(x, [w], search.row_scale, grid) for w, grid in zip(weights, grids, strict=True))
    assert search.loss == pytest.approx(expected, rel=1e-3)
    assert search.loss < search.identity_loss
    assert search.loss > run_search(x, weights, Grid(8, IN, False), duo_scaling=duo_scaling).loss


def test_when_no_candidate_can_be_stored_the_identity_is_the_result():
    search = run_search(outlier_input(0), random_weights(0), smallest=torch.full((IN,), float("inf")))
    assert search.alpha is None
    assert torch.equal(search.row_scale, torch.ones(IN))


@given(
    values=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 1e-3, 1.0, 50.0, 1e6, 1e30]), min_size=1, max_size=8),
    duo_scaling=st.booleans(),
    n_grid=st.integers(1, 20),
)
def test_candidates_are_positive_finite_and_normalized_and_dead_channels_keep_one(values, duo_scaling, n_grid):
    x_mean = torch.tensor(values)
    w_mean = torch.rand(len(values), generator=generator(0)) if duo_scaling else None
    scales, usable = scale_candidates(x_mean, w_mean, n_grid)
    assert scales.shape == (n_grid, len(values))
    assert usable.shape == (n_grid,)
    for scale in scales[usable]:
        assert bool(torch.isfinite(scale).all() & (scale > 0).all())
        assert bool((scale[x_mean == 0] == 1).all())
        alive = scale[x_mean > 0].double()
        if alive.numel():
            assert float(alive.max() * alive.min()) == pytest.approx(1, rel=1e-3)


def ranges_of_step(weight: Tensor, grid: Grid, step: int) -> GroupRange:
    full = group_range(weight, grid)
    bound = torch.maximum(-full.low, full.high) * (1 - step * STEP)
    return GroupRange(torch.maximum(full.low, -bound), torch.minimum(full.high, bound))


def block_diagonal(gram: Tensor, grid: Grid) -> Tensor:
    """Returns `gram` with all elements that couple different groups set to zero."""
    result = torch.zeros_like(gram)
    for start in range(0, gram.shape[0], grid.group_size):
        block = slice(start, start + grid.group_size)
        result[block, block] = gram[block, block]
    return result


def row_error(weight: Tensor, gram: Tensor, grid: Grid, ranges: GroupRange) -> Tensor:
    """Returns dᵀ G d for every row, (out,) fp64."""
    difference = (quantize_dequantize(weight, grid, ranges) - weight).double()
    return ((difference @ gram.double()) * difference).sum(dim=1)


@pytest.mark.usefixtures("exhaustive")
@GRIDS
@pytest.mark.parametrize("seed", [0, 1])
def test_clipping_without_coupled_groups_is_the_best_of_a_loop_over_every_row_and_group(seed, grid):
    """Uncoupled groups cannot affect each other, so every group keeps the winner of its own search."""
    weight = random_weights(seed, rows=(12,))[0]
    weight[:, 3] *= 6
    x = outlier_input(seed)
    gram = block_diagonal(statistics_of(x).gram, grid)
    found = search_clip(weight, gram, grid)
    steps_taken = set()
    for row in range(weight.shape[0]):
        for group in range(weight.shape[1] // grid.group_size):
            columns = slice(group * grid.group_size, (group + 1) * grid.group_size)
            w, block = weight[row : row + 1, columns], gram[columns, columns]
            one_group = Grid(grid.bits, grid.group_size, grid.zero_point)
            candidates = [ranges_of_step(w, one_group, step) for step in range(STEPS)]
            errors = [float(row_error(w, block, one_group, candidate)) for candidate in candidates]
            taken = GroupRange(
                found.low[row : row + 1, group : group + 1], found.high[row : row + 1, group : group + 1]
            )
            step = next(
                i
                for i, c in enumerate(candidates)
                if torch.allclose(c.low, taken.low, rtol=1e-6) and torch.allclose(c.high, taken.high, rtol=1e-6)
            )
            assert errors[step] <= min(errors) * (1 + 1e-4)
            steps_taken.add(step)
    assert len(steps_taken) > 2


@GRIDS
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_keeps_its_clipped_ranges_only_where_they_lower_its_error_on_the_full_gram_matrix(seed, grid):
    weight = random_weights(seed, rows=(40,))[0]
    weight[:, 3] *= 6
    # A part common to all channels couples the groups, so errors that are small on their own add up.
    gram = statistics_of(outlier_input(seed) + 20).gram
    clipped, full = search_clip(weight, gram, grid), group_range(weight, grid)
    taken = round_weight(weight, gram, grid, clipped=clipped).parameters
    error_clipped, error_full = row_error(weight, gram, grid, clipped), row_error(weight, gram, grid, full)
    clear = (error_clipped - error_full).abs() > 1e-4 * (error_clipped + error_full)
    better = error_clipped < error_full
    for row in range(weight.shape[0]):
        if clear[row]:
            expected = group_parameters(clipped if better[row] else full, grid)
            assert torch.equal(taken.scale[row], expected.scale[row])
            assert torch.equal(taken.zero[row], expected.zero[row])
    assert bool(better.any())
    if grid.group_size < IN:
        assert not bool(better[clear].all()), "some row must need the confirmation"


def rounded_with_clip(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    rounded = round_weight(weight, gram, grid, clipped=search_clip(weight, gram, grid))
    return dequantize(rounded.codes, rounded.parameters, grid)


@GRIDS
@pytest.mark.parametrize(("x", "weights"), [pytest.param(*case, id=name) for name, case in adversarial().items()])
def test_clipping_never_raises_the_error_of_any_row(x, weights, grid):
    weight, gram = weights[0].float(), statistics_of(x).gram
    ranges = search_clip(weight, gram, grid)
    assert ranges.low.shape == ranges.high.shape == (weight.shape[0], IN // grid.group_size)
    nearest = quantize_dequantize(weight, grid)
    # The fp32 terms cancel, so the tolerance is relative to the size of the terms.
    terms = ((nearest - weight).abs().double() @ gram.abs().double() * (nearest - weight).abs().double()).sum(dim=1)
    allowed = explicit_mse(x, weight, nearest) + 1e-5 * terms
    assert bool((explicit_mse(x, weight, rounded_with_clip(weight, gram, grid)) <= allowed).all())


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 40), shift=st.sampled_from([0.0, 1.0, 30.0]))
def test_clipping_never_raises_the_error_of_any_row_on_any_input(seed, tokens, shift):
    x, weight = outlier_input(seed, tokens) + shift, random_weights(seed, rows=(6,))[0]
    gram = statistics_of(x).gram
    nearest = quantize_dequantize(weight, GRID)
    terms = ((nearest - weight).abs().double() @ gram.abs().double() * (nearest - weight).abs().double()).sum(dim=1)
    clipped = explicit_mse(x, weight, rounded_with_clip(weight, gram, GRID))
    assert bool((clipped <= explicit_mse(x, weight, nearest) + 1e-5 * terms).all())


def test_clipped_ranges_lie_within_the_full_ones_and_hold_zero():
    weight = random_weights(0)[0]
    full, found = group_range(weight, GRID), search_clip(weight, statistics_of(outlier_input(0)).gram, GRID)
    assert bool(((full.low <= found.low) & (found.low <= 0)).all())
    assert bool(((full.high >= found.high) & (found.high >= 0)).all())


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 7])
def test_how_many_rows_are_searched_at_a_time_does_not_change_results(monkeypatch, rows_at_a_time):
    x, weights = outlier_input(0), random_weights(0)
    gram = statistics_of(x).gram
    scale, clip = run_search(x, weights), search_clip(weights[0], gram, GRID)
    monkeypatch.setattr(hf_awq_offload.search.chunks, "CACHED_ELEMENTS", rows_at_a_time * IN)
    monkeypatch.setattr(hf_awq_offload.search.chunks, "CACHED_ROWS", 1)
    scale_in_chunks, clip_in_chunks = run_search(x, weights), search_clip(weights[0], gram, GRID)
    assert scale_in_chunks.alpha == scale.alpha
    assert scale_in_chunks.loss == pytest.approx(scale.loss, rel=1e-5)
    torch.testing.assert_close(scale_in_chunks.row_scale, scale.row_scale, rtol=1e-5, atol=0)
    assert torch.equal(clip_in_chunks.low, clip.low)
    assert torch.equal(clip_in_chunks.high, clip.high)
