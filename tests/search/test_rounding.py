"""Tests error feedback against a slow reference, and tests what it guarantees."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from hf_awq_offload.errors import NumericalError
from hf_awq_offload.formats.grid import Grid, GroupParameters, dequantize, group_parameters, group_range, quantize
from hf_awq_offload.search import factorization, feedback, rounding
from hf_awq_offload.search.clip import search_clip
from hf_awq_offload.search.factorization import DAMPING
from hf_awq_offload.search.feedback_state import FeedbackState
from hf_awq_offload.search.loss import row_mse
from hf_awq_offload.search.rounding import feedback_order, round_weight, round_with_feedback

GRID = Grid(4, 32, zero_point=True)
OUT, IN = 24, 320  # more channels than a block, and not a multiple of it


def correlated_gram(seed: int, tokens: int = 900) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 40, generator=generator) @ torch.randn(40, IN, generator=generator)
    x += 0.5 * torch.randn(tokens, IN, generator=generator)
    x *= torch.exp(torch.randn(IN, generator=generator))
    return x.t() @ x / tokens


def random_weight(seed: int) -> tuple[Tensor, GroupParameters]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05
    return weight, group_parameters(group_range(weight, GRID), GRID)


def reference_feedback(weight: Tensor, gram: Tensor, parameters: GroupParameters) -> Tensor:
    """Runs optimal brain quantization column by column, refitting the rest with an inverse after each column.

    The update that minimizes tr(D G Dᵀ) once channel i is fixed is δ = -e · (H⁻¹)_i / (H⁻¹)_ii with H restricted to the
    channels that are not fixed yet (Frantar et al. 2022, arXiv:2208.11580); in fp64, without any factorization trick.
    """
    gram = gram.double()
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    order = feedback_order(gram.float()).channels.tolist()
    remaining, codes = weight.double().clone(), torch.zeros(OUT, IN, dtype=torch.float64)
    for position, i in enumerate(order):
        free = order[position:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        scale, zero = (parameter[:, i // GRID.group_size].double() for parameter in parameters)
        codes[:, i] = (torch.round(remaining[:, i] / scale) + zero).clamp(0, GRID.levels)
        error = (codes[:, i] - zero) * scale - remaining[:, i]
        remaining[:, free] += torch.outer(error, inverse[0]) / inverse[0, 0]
    return codes


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_optimal_brain_quantization_without_the_tricks(seed):
    """Requires equal errors and nearly all codes to agree: ties and near-ties may fall the other way in fp32."""
    gram = correlated_gram(seed)
    weight, parameters = random_weight(seed)
    codes, own_mse = round_with_feedback(weight, feedback_order(gram), parameters, GRID)
    expected = reference_feedback(weight, gram, parameters).float()
    assert float((codes == expected).float().mean()) > 0.98
    mse, expected_mse = (row_mse(dequantize(c, parameters, GRID) - weight, gram) for c in (codes, expected))
    assert float(mse.sum()) == pytest.approx(float(expected_mse.sum()), rel=0.02)
    torch.testing.assert_close(own_mse, mse, rtol=1e-3, atol=1e-4 * float(mse.mean()))


def test_the_error_is_far_below_that_of_the_nearest_where_inputs_are_correlated():
    gram = correlated_gram(2)
    weight, parameters = random_weight(2)
    nearest = round_weight(weight, gram, GRID)
    feedback = round_weight(weight, gram, GRID, order=feedback_order(gram))
    assert torch.equal(nearest.codes, quantize(weight, parameters, GRID))
    assert float(feedback.mse.sum()) < 0.5 * float(nearest.mse.sum())


@pytest.mark.parametrize("clip", [False, True], ids=["full range", "clip"])
@pytest.mark.parametrize("kind", ["random", "rank one", "zero", "one huge channel", "dead channels"])
def test_no_row_is_ever_worse_than_rounded_to_the_nearest(kind, clip):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, IN, generator=generator)
    if kind == "rank one":
        x = x[:, :1] * torch.randn(IN, generator=generator)
    elif kind == "zero":
        x = torch.zeros(500, IN)
    elif kind == "one huge channel":
        x[:, 7] *= 1e4
    elif kind == "dead channels":
        x[:, ::3] = 0
    gram = x.t() @ x / 500
    weight, _ = random_weight(3)
    nearest = round_weight(weight, gram, GRID)
    clipped = search_clip(weight, gram, GRID) if clip else None
    codes, mse, parameters, *_ = round_weight(weight, gram, GRID, clipped=clipped, order=feedback_order(gram))
    assert bool((mse <= nearest.mse).all())
    assert bool(((codes >= 0) & (codes <= GRID.levels) & (codes == codes.round())).all())
    # Measured on the inputs themselves, in fp64: the errors that the function reports are those of its codes.
    explicit, explicit_nearest = (
        (x.double() @ (dequantize(*rounded, GRID).double() - weight.double()).t()).square().mean(dim=0)
        for rounded in ((codes, parameters), (nearest.codes, nearest.parameters))
    )
    assert bool((explicit <= explicit_nearest * (1 + 1e-3) + 1e-6 * float(explicit_nearest.mean())).all())


def test_rows_that_feedback_worsens_are_rounded_to_the_nearest():
    """Misleads the feedback with the order of another matrix."""
    weight, parameters = random_weight(8)
    gram = correlated_gram(8)
    nearest = round_weight(weight, gram, GRID)
    misled = feedback_order(correlated_gram(9))
    misled = misled._replace(pivots=misled.pivots * 1e6)  # so the reported loss is worse everywhere
    rounded = round_weight(weight, gram, GRID, order=misled, nearest_mse=nearest.mse)
    assert torch.equal(rounded.codes, quantize(weight, parameters, GRID))
    assert torch.equal(rounded.mse, nearest.mse)


@pytest.mark.parametrize("width", [24, 513, 1100])
def test_the_loss_by_blocks_is_that_of_the_whole_matrix(width):
    generator = torch.Generator().manual_seed(0)
    x, difference = torch.randn(300, width, generator=generator), torch.randn(7, width, generator=generator)
    gram = x.t() @ x / 300
    expected = ((difference.double() @ gram.double()) * difference.double()).sum(dim=1)
    torch.testing.assert_close(row_mse(difference, gram).double(), expected, rtol=1e-4, atol=0)


def test_with_uncorrelated_inputs_it_is_rounding_to_the_nearest():
    weight, parameters = random_weight(4)
    gram = torch.diag(torch.rand(IN, generator=torch.Generator().manual_seed(4)) + 0.5)
    codes, _ = round_with_feedback(weight, feedback_order(gram), parameters, GRID)
    assert torch.equal(codes, quantize(weight, parameters, GRID))


def test_rows_do_not_depend_on_each_other():
    """Linears that share an input may be stacked or rounded one by one."""
    order = feedback_order(correlated_gram(5))
    weight, parameters = random_weight(5)
    whole, _ = round_with_feedback(weight, order, parameters, GRID)
    halves = [
        round_with_feedback(weight[rows], order, GroupParameters(*(p[rows] for p in parameters)), GRID)[0]
        for rows in (slice(0, 8), slice(8, None))
    ]
    assert float((whole == torch.cat(halves)).float().mean()) > 0.999


def damped(gram: Tensor) -> Tensor:
    """Returns G + λI in fp64."""
    return gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_each_channel_varies_least_given_those_rounded_after_it(monkeypatch):
    monkeypatch.setattr(factorization, "ORDER_BLOCKS", 64)
    gram = correlated_gram(6)[:64, :64]
    channels, matrix = feedback_order(gram).channels.tolist(), damped(gram)
    assert sorted(channels) == list(range(64))
    for position in range(64):
        earlier, later = channels[: position + 1], channels[position + 1 :]
        explained = matrix[earlier][:, later] @ torch.linalg.inv(matrix[later][:, later]) @ matrix[later][:, earlier]
        variances = (matrix[earlier][:, earlier] - explained).diagonal()
        assert float(variances[-1]) <= 1.001 * float(variances.min())


@pytest.mark.parametrize("seed", range(4))
def test_the_order_makes_pivots_more_even_than_loudness_does(seed):
    """The product of the pivots is the determinant of the matrix, so more even pivots have a smaller sum."""
    gram = correlated_gram(seed)
    by_loudness = torch.argsort(gram.diagonal())  # in reverse rounding order
    pivots = torch.linalg.cholesky(damped(gram)[by_loudness][:, by_loudness]).diagonal().square()
    found = feedback_order(gram).pivots.double()
    assert float(found.log().sum()) == pytest.approx(float(pivots.log().sum()), abs=0.01)
    assert float(found.sum()) < float(pivots.sum())


def test_a_matrix_that_is_not_positive_is_taken_in_the_order_of_loudness():
    gram = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    gram[1, 3] = gram[3, 1] = -5.0
    order = feedback_order(gram)
    assert order.channels.tolist() == [1, 3, 2, 0]
    assert float(order.damping) > DAMPING * 2.5


def test_the_factor_is_of_the_damped_matrix():
    gram = correlated_gram(6)
    order = feedback_order(gram)
    ordered = gram[order.channels][:, order.channels].double()
    assert float(order.damping) == pytest.approx(DAMPING * float(gram.diagonal().mean()), rel=1e-5)
    damped = ordered + order.damping.double() * torch.eye(IN, dtype=torch.float64)
    coupling = order.coupling.double()
    product = coupling @ torch.diag(order.pivots.double()) @ coupling.t()
    torch.testing.assert_close(product, damped, atol=1e-5 * float(damped.max()), rtol=0)
    assert bool((order.coupling.tril(-1) == 0).all())
    assert torch.equal(order.coupling.diagonal(), torch.ones(IN))


def test_how_many_rows_and_channels_are_rounded_at_a_time_changes_next_to_nothing(monkeypatch):
    order, (weight, parameters) = feedback_order(correlated_gram(5)), random_weight(5)
    whole, mse = round_with_feedback(weight, order, parameters, GRID)
    monkeypatch.setattr(rounding, "STACK_ELEMENTS", 5 * IN)
    monkeypatch.setattr(feedback, "LEAF_CHANNELS", 3)
    parts, parts_mse = round_with_feedback(weight, order, parameters, GRID)
    assert float((whole == parts).float().mean()) > 0.99
    assert float(parts_mse.sum()) == pytest.approx(float(mse.sum()), rel=0.01)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("channels", "rows", "grid"),
    [
        (131, 40, Grid(4, 32, zero_point=True)),  # a full block and a ragged one, a full program and a ragged one
        (160, 7, Grid(3, 64, zero_point=False)),
        (48, 32, Grid(4, 1, zero_point=True)),
        (13, 33, Grid(8, IN, zero_point=True)),
    ],
    ids=str,
)
def test_the_kernel_rounds_as_the_loop_does(monkeypatch, channels, rows, grid):
    from hf_awq_offload.search.feedback_kernel import BLOCK_CHANNELS, round_block

    device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernel
    order = feedback_order(correlated_gram(3)[:channels, :channels])
    weight = torch.randn(rows, IN, generator=torch.Generator().manual_seed(3)) * 0.05
    parameters = group_parameters(group_range(weight, grid), grid)
    transposed = weight[:, :channels].t()[order.channels].contiguous()
    per_group = [each.t().contiguous() for each in parameters]
    kernel = feedback.Leaf(BLOCK_CHANNELS, BLOCK_CHANNELS, round_block)
    loop = feedback.Leaf(5, 1, feedback._round_one_by_one)
    outcomes = []
    for leaf in (loop, kernel):
        tensors = [transposed.clone(), transposed.clone(), torch.zeros(rows), *per_group]
        tensors += [order.channels // grid.group_size, order.coupling, order.pivots]
        state = FeedbackState(*(tensor.to(device) for tensor in tensors))
        monkeypatch.setattr(feedback, "_leaf_on", lambda device, leaf=leaf: leaf)
        feedback.feed_back(state, grid.levels)
        outcomes.append([each.cpu() for each in state[:3]])
    (codes, errors, squares), (kernel_codes, kernel_errors, kernel_squares) = outcomes
    assert bool((kernel_codes == kernel_codes.round()).all())
    same = (codes == kernel_codes).all(dim=0)
    assert float(same.float().mean()) > 0.9  # ties may fall the other way, and change what comes after them
    torch.testing.assert_close(errors[:, same], kernel_errors[:, same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares[same], kernel_squares[same], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_rounds_halves_to_even_and_divides_exactly():
    from hf_awq_offload.search.feedback_kernel import round_block

    device = "cuda" if torch.cuda.is_available() else "cpu"
    below_half = float(torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)))
    quotients = torch.tensor([-9.5, -2.5, -0.5, -below_half, below_half, 0.5, 1.5, 2.5, 3.4999998, 6.5, 7.5, 1e9])
    scale = torch.tensor([1.0, 0.1, 0.0123])[:, None].half().float()
    rows = len(quotients)
    weight = quotients * scale  # (channels, rows), each channel a group
    state = FeedbackState(
        weight.clone(), weight.clone(), torch.zeros(rows), scale.repeat(1, rows), torch.full_like(weight, 8.0),
        torch.arange(3), torch.eye(3), torch.ones(3),
    )  # fmt: skip
    state = FeedbackState(*(tensor.to(device) for tensor in state))
    round_block(state, 0, 3, 15)
    expected = (torch.round(weight / scale) + 8).clamp(0, 15)
    assert torch.equal(state.remaining.cpu(), expected)
    torch.testing.assert_close(state.errors.cpu(), weight - (expected - 8) * scale, rtol=1e-6, atol=1e-7)


def test_a_matrix_that_is_not_finite_is_an_error():
    gram = correlated_gram(7)
    gram[3, 4] = gram[4, 3] = float("nan")
    with pytest.raises(NumericalError, match="could not be factorized"):
        feedback_order(gram)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "a part of another"])
def test_the_matrix_is_only_read_however_it_lies_in_memory(layout):
    whole = correlated_gram(4)
    whole = (whole + whole.t()) / 2
    gram = {"contiguous": whole[:100, :100].contiguous(), "transposed": whole[:100, :100].contiguous().t()}.get(
        layout, whole[:100, :100]
    )
    before = gram.clone()
    order = feedback_order(gram)
    assert torch.equal(gram, before)
    for found, expected in zip(order, feedback_order(before.contiguous()), strict=True):
        assert torch.equal(found, expected)
        assert found.is_contiguous()
