"""Tests scales refitted to codes against least squares on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_awq_offload.formats.grid import (
    Grid,
    GroupParameters,
    dequantize,
    group_parameters,
    group_range,
    quantize,
    stored_scale,
)
from hf_awq_offload.search import refit
from hf_awq_offload.search.chunks import chunks_of_at_most
from hf_awq_offload.search.loss import row_mse
from hf_awq_offload.search.refit import refitted
from hf_awq_offload.search.rounding import feedback_order, round_weight, round_with_feedback

OUT, IN, TOKENS = 20, 192, 600
GRIDS = [
    Grid(bits, size, zero_point=asymmetric) for bits in (2, 4) for size in (32, IN) for asymmetric in (True, False)
]
NO_DAMPING = torch.tensor(0.0)


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, 30, generator=generator) @ torch.randn(30, IN, generator=generator)
    return x + torch.randn(TOKENS, IN, generator=generator)


def rounded(seed: int, grid: Grid) -> tuple[Tensor, Tensor, GroupParameters]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05
    parameters = group_parameters(group_range(weight, grid), grid)
    return weight, quantize(weight, parameters, grid), parameters


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_least_squares_on_the_outputs(grid):
    x = inputs(0).double()
    weight, codes, parameters = rounded(0, grid)
    found, _ = refitted(weight, codes, parameters, (x.T @ x / TOKENS).float(), NO_DAMPING, grid)
    for row in range(OUT):
        centered = grid.groups(codes[row : row + 1])[0] - parameters.zero[row, :, None]
        outputs = torch.stack(
            [x.unflatten(1, (-1, grid.group_size))[:, g] @ q.double() for g, q in enumerate(centered)]
        )
        solution = torch.linalg.lstsq(outputs.T, x @ weight[row].double()).solution
        torch.testing.assert_close(found.scale[row], stored_scale(solution.float(), grid), rtol=2e-3, atol=0)
    assert torch.equal(found.zero, parameters.zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_error_falls_by_what_is_said(grid):
    x = inputs(1)
    gram = x.T @ x / TOKENS
    weight, codes, parameters = rounded(1, grid)
    found, change = refitted(weight, codes, parameters, gram, NO_DAMPING, grid)
    before, after = (row_mse(dequantize(codes, each, grid) - weight, gram) for each in (parameters, found))
    torch.testing.assert_close(after - before, change, rtol=1e-2, atol=1e-4 * float(before.mean()))
    assert bool((change <= 1e-4 * before).all())
    assert float(after.sum()) < 0.99 * float(before.sum())


@pytest.mark.parametrize("case", ["codes at the zero point", "no inputs", "wrong sign", "not finite"])
def test_where_no_scale_is_better_the_old_one_stays(case):
    grid, x = Grid(4, 32, zero_point=True), inputs(2)
    weight, codes, parameters = rounded(2, grid)
    if case == "codes at the zero point":
        codes = parameters.zero.repeat_interleave(grid.group_size, dim=1)
    elif case == "no inputs":
        x = torch.zeros_like(x)
    elif case == "wrong sign":
        weight = -weight
    gram = x.T @ x / TOKENS
    if case == "not finite":
        gram[3, 5] = gram[5, 3] = torch.nan
    found, _ = refitted(weight, codes, parameters, gram, NO_DAMPING, grid)
    assert torch.equal(found.scale, parameters.scale) or case == "wrong sign"
    assert bool((found.scale > 0).all())
    kept = found.scale == parameters.scale
    assert float(kept.float().mean()) > 0.9


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fitting_and_rounding_again_are_never_worse_than_rounding_once_and_better_in_all(grid):
    x = inputs(3)
    gram = x.T @ x / TOKENS
    weight, _, parameters = rounded(3, grid)
    order = feedback_order(gram)
    once = round_with_feedback(weight, order, parameters, grid)[1]
    found = round_weight(weight, gram, grid, order=order)
    assert bool((found.mse <= once).all())
    assert float(found.mse.sum()) < float(once.sum())
    explicit = row_mse(dequantize(found.codes, found.parameters, grid) - weight, gram)
    torch.testing.assert_close(found.mse, explicit, rtol=5e-3, atol=1e-4 * float(explicit.mean()))


@pytest.mark.parametrize("elements", [None, 7 * OUT * IN // 2, 1], ids=["all groups", "three groups", "one group"])
@pytest.mark.parametrize("size", [32, IN])
def test_the_equations_are_the_same_however_many_groups_are_taken_at_once(size, elements):
    """Half of a symmetric matrix is computed on an accelerator, several groups at once; a CPU computes row by row."""
    x, grid = inputs(4), Grid(4, size, zero_point=True)
    weight, codes, parameters = rounded(4, grid)
    centered, gram = grid.groups(codes) - parameters.zero[:, :, None], x.T @ x / TOKENS
    matrix, right = refit._equations(weight, centered, gram)
    with chunks_of_at_most(elements):
        own_matrix, own_right = refit._equations_in_blocks(weight, centered, gram)
    torch.testing.assert_close(own_matrix, matrix, rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))
    torch.testing.assert_close(own_right, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
    torch.testing.assert_close(own_matrix, own_matrix.transpose(1, 2), rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))
