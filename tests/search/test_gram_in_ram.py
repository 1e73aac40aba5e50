"""A gram matrix that stays in RAM gives what one on the device gives: losses, orders, codes and scales."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_awq_offload.errors import NumericalError
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range, quantize
from hf_awq_offload.search import factorization_in_place, gram_matrix
from hf_awq_offload.search.chunks import chunks_of_at_most, grams_left_in_ram
from hf_awq_offload.search.clip import gram_blocks, search_clip
from hf_awq_offload.search.gram_matrix import GramInRam
from hf_awq_offload.search.loss import row_mse
from hf_awq_offload.search.refit import refitted
from hf_awq_offload.search.rounding import feedback_order, round_weight
from hf_awq_offload.search.scale import search_scale
from hf_awq_offload.search.statistics import InputStatistics

CPU = torch.device("cpu")
OUT, IN = 40, 320


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(gram_matrix, "BLOCK_CHANNELS", 48)
    monkeypatch.setattr(factorization_in_place, "PANEL_CHANNELS", 56)


def gram(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(900, 40, generator=generator) @ torch.randn(40, IN, generator=generator)
    x += 0.5 * torch.randn(900, IN, generator=generator)
    x *= torch.exp(torch.randn(IN, generator=generator))
    return x.t() @ x / 900


def statistics(scaled: bool, in_ram: bool) -> InputStatistics:
    whole = gram()
    held = InputStatistics(GramInRam(whole.clone(), CPU) if in_ram else whole, whole.diagonal().sqrt(), 900)
    return held.divided(torch.rand(IN, generator=torch.Generator().manual_seed(1)) + 0.5) if scaled else held


def both(scaled: bool) -> tuple[Tensor, GramInRam]:
    here, there = (statistics(scaled, in_ram).gram for in_ram in (False, True))
    assert isinstance(here, Tensor)
    assert isinstance(there, GramInRam)
    return here, there


def weight(seed: int = 3) -> Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


SCALED = pytest.mark.parametrize("scaled", [False, True], ids=["as collected", "scaled"])


@SCALED
def test_rows_blocks_and_losses(scaled):
    here, there = both(scaled)
    before = there.matrix.clone()
    assert torch.equal(there.rows(slice(30, 90)), here[30:90])
    assert torch.equal(there.rows_of(torch.tensor([5, 300, 7])), here[[5, 300, 7]])
    for size in (32, 64, IN):
        assert torch.equal(gram_blocks(there, Grid(4, size, True)), gram_blocks(here, Grid(4, size, True)))
    difference = weight()
    torch.testing.assert_close(row_mse(difference, there), row_mse(difference, here), rtol=1e-4, atol=0)
    assert torch.equal(there.matrix, before), "what is in RAM is left alone"


@SCALED
@pytest.mark.parametrize("with_factors", [False, True])
def test_the_order_and_the_factor(scaled, with_factors):
    here, there = both(scaled)
    factors = torch.rand(IN, generator=torch.Generator().manual_seed(2)) + 0.5 if with_factors else None
    expected, found = feedback_order(here, factors), feedback_order(there, factors)
    assert torch.equal(found.channels, expected.channels)
    torch.testing.assert_close(found.damping, expected.damping, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.pivots, expected.pivots, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.coupling.triu(), expected.coupling.triu(), rtol=1e-3, atol=1e-4)
    assert not found.coupling.tril(-1).any()


def test_a_matrix_that_is_not_positive_is_taken_in_the_order_of_loudness():
    matrix = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    matrix[1, 3] = matrix[3, 1] = -5.0
    assert feedback_order(GramInRam(matrix, CPU)).channels.tolist() == [1, 3, 2, 0]


def test_a_matrix_that_is_not_finite_is_an_error():
    matrix = gram()
    matrix[3, 7] = matrix[7, 3] = torch.nan
    with pytest.raises(NumericalError, match="320 channels could not be factorized"):
        feedback_order(GramInRam(matrix, CPU))


@SCALED
@pytest.mark.parametrize("group_size", [16, 64, 160, IN])
def test_fitted_scales(scaled, group_size):
    grid, weights, (here, there) = Grid(4, group_size, True), weight(), both(scaled)
    parameters = group_parameters(group_range(weights, grid), grid)
    codes, damping = quantize(weights, parameters, grid), 0.01 * here.diagonal().mean()
    found: list[tuple[Tensor, Tensor]] = []
    for held in (here, there):
        fitted, change = refitted(weights, codes, parameters, held, damping, grid)
        found.append((fitted.scale, change))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-3, atol=0)
    torch.testing.assert_close(found[1][1].sum(), found[0][1].sum(), rtol=1e-3, atol=0)


@SCALED
@pytest.mark.parametrize("most", [None, 5000])
def test_rounded_weights(scaled, most):
    grid, weights = Grid(4, 32, True), weight()

    def rounded(held: Tensor | GramInRam) -> tuple[Tensor, Tensor]:
        clipped = search_clip(weights, held, grid)
        found = round_weight(weights, held, grid, clipped=clipped, order=feedback_order(held))
        return found.codes, found.mse

    with chunks_of_at_most(most):
        (expected, mse), (codes, own_mse) = map(rounded, both(scaled))
    assert float((codes == expected).float().mean()) > 0.99  # ties may fall the other way
    assert float(own_mse.sum()) == pytest.approx(float(mse.sum()), rel=0.01)


@pytest.mark.parametrize("with_feedback", [False, True])
def test_searched_scales(with_feedback):
    def searched(held: InputStatistics):
        return search_scale(
            [weight(3), weight(4)], held, [Grid(4, 32, True)] * 2, n_grid=20, duo_scaling=True,
            row_of_channel=torch.arange(IN), rows=IN, with_feedback=with_feedback,
        )  # fmt: skip

    expected, found = (searched(statistics(False, in_ram)) for in_ram in (False, True))
    assert found.alpha == expected.alpha is not None
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_statistics_go_to_another_device_unless_they_are_to_stay(left):
    held = InputStatistics(gram(), torch.ones(IN), 900)
    meta = torch.device("meta")
    with grams_left_in_ram(left):
        sent = held.to(meta)
        assert held.to(CPU).gram is held.gram
    assert isinstance(sent.gram, GramInRam) == left
    assert sent.gram.device == sent.mean_abs.device == meta


def test_numbers_in_reverse_order():
    for n in (1, 2, 7, 100):
        matrix = torch.arange(n * n, dtype=torch.float32).view(n, n)
        expected: Callable[[], Tensor] = matrix.flip((0, 1)).clone
        assert torch.equal(factorization_in_place.reversed_in_place(matrix.clone()), expected())
