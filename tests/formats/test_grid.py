"""The grid against a reference of scalar loops, and what it promises for any weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_awq_offload.formats.grid import (
    MIN_RANGE,
    Grid,
    GroupParameters,
    GroupRange,
    dequantize,
    group_parameters,
    group_range,
    quantize,
    quantize_dequantize,
    resolve_group_size,
)

GROUP = 8
BOTH_KINDS = pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])

F32 = np.float32


def reference(weight: Tensor, grid: Grid, ranges: GroupRange | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, zero, dequantized) by the formulas of the module, one fp32 number at a time."""
    out, in_ = weight.shape
    n = in_ // grid.group_size
    codes, dequantized = torch.empty(out, in_), torch.empty(out, in_)
    scales, zeros = torch.empty(out, n), torch.empty(out, n)
    for row in range(out):
        for group in range(n):
            columns = range(group * grid.group_size, (group + 1) * grid.group_size)
            values = [F32(weight[row, column].item()) for column in columns]
            low, high = min(*values, F32(0)), max(*values, F32(0))
            if ranges is not None:
                low, high = F32(ranges.low[row, group].item()), F32(ranges.high[row, group].item())
            if grid.zero_point:
                exact = max(F32(high - low), F32(MIN_RANGE)) / F32(2**grid.bits - 1)
            else:
                exact = max(-low, high, F32(MIN_RANGE)) / F32(2 ** (grid.bits - 1) - 1)
            scale = F32(np.float16(min(exact, F32(np.finfo(np.float16).max))))
            if grid.zero_point:
                zero = min(max(-round(float(low / scale)), 0), 2**grid.bits - 1)
            else:
                zero = 2 ** (grid.bits - 1)
            scales[row, group], zeros[row, group] = float(scale), zero
            for column, value in zip(columns, values, strict=True):
                code = min(max(round(float(value / scale)) + zero, 0), 2**grid.bits - 1)
                codes[row, column] = code
                dequantized[row, column] = float(F32(code - zero) * scale)
    return codes, scales, zeros, dequantized


def round_trip(weight: Tensor, grid: Grid) -> tuple[Tensor, GroupParameters, Tensor]:
    parameters = group_parameters(group_range(weight, grid), grid)
    codes = quantize(weight, parameters, grid)
    return codes, parameters, dequantize(codes, parameters, grid)


def per_channel(of_groups: Tensor, grid: Grid) -> Tensor:
    return of_groups.repeat_interleave(grid.group_size, dim=1)


weights = st.builds(
    lambda seed, magnitude, shift: (
        torch.randn(3, 2 * GROUP, generator=torch.Generator().manual_seed(seed)) + shift
    ) * magnitude,
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([1e-9, 1e-7, 1e-6, 1e-4, 1e-2, 1.0, 37.0, 1e4]),
    shift=st.sampled_from([0.0, 0.0, 0.5, -2.0, 10.0, -10.0]),
)  # fmt: skip
listed_weights = st.lists(
    st.floats(-6e4, 6e4, width=32, allow_subnormal=False), min_size=2 * GROUP, max_size=2 * GROUP
).map(lambda values: torch.tensor([values]))
any_weight = st.one_of(weights, listed_weights)
kinds = st.booleans()
bit_widths = st.sampled_from([2, 3, 4, 8])


def special_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 2 * GROUP, generator=generator)
    one_huge = noise.clone()
    one_huge[:, 3] = 1e5
    negative_huge = noise.clone()
    negative_huge[:, 11] = -3e4
    half_dead = noise.clone()
    half_dead[:, :GROUP] = 0
    return {
        "zeros": torch.zeros(3, 2 * GROUP),
        "one dead group": half_dead,
        "constant": torch.full((3, 2 * GROUP), 0.37),
        "negative constant": torch.full((3, 2 * GROUP), -0.37),
        "one huge value": one_huge,
        "one huge negative value": negative_huge,
        "tiny": noise * 1e-7,
        "subnormal": noise * 1e-40,
        "negative only": -noise.abs() - 1e-3,
        "positive only": noise.abs() + 1e-3,
        "two values": torch.where(noise > 0, 1.0, -1.0),
        "beyond fp16": noise * 1e7,
    }


SPECIAL = pytest.mark.parametrize("weight", [pytest.param(w, id=name) for name, w in special_weights().items()])


@BOTH_KINDS
@SPECIAL
def test_special_weights_match_the_loops(weight, zero_point):
    grid = Grid(4, GROUP, zero_point)
    codes, parameters, dequantized = round_trip(weight, grid)
    expected_codes, expected_scale, expected_zero, expected = reference(weight, grid)
    assert torch.equal(parameters.scale, expected_scale)
    assert torch.equal(parameters.zero, expected_zero)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(dequantized, expected)


@given(weight=any_weight, zero_point=kinds, bits=bit_widths)
def test_any_weight_matches_the_loops(weight, zero_point, bits):
    grid = Grid(bits, GROUP, zero_point)
    codes, parameters, dequantized = round_trip(weight, grid)
    expected_codes, expected_scale, expected_zero, expected = reference(weight, grid)
    assert torch.equal(parameters.scale, expected_scale)
    assert torch.equal(parameters.zero, expected_zero)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(dequantized, expected)
    assert torch.equal(quantize_dequantize(weight, grid), expected)


@given(weight=weights, zero_point=kinds, share=st.floats(0.3, 1.0))
def test_a_narrowed_range_matches_the_loops_and_saturates(weight, zero_point, share):
    grid = Grid(4, GROUP, zero_point)
    full = group_range(weight, grid)
    narrowed = GroupRange(full.low * share, full.high * share)
    expected_codes, _, _, expected = reference(weight, grid, narrowed)
    parameters = group_parameters(narrowed, grid)
    assert torch.equal(quantize(weight, parameters, grid), expected_codes)
    assert torch.equal(quantize_dequantize(weight, grid, narrowed), expected)


@given(weight=any_weight, zero_point=kinds, bits=bit_widths)
def test_codes_are_integers_on_the_grid_and_zero_points_too(weight, zero_point, bits):
    grid = Grid(bits, GROUP, zero_point)
    codes, parameters, _ = round_trip(weight, grid)
    for integers in (codes, parameters.zero):
        assert torch.equal(integers, integers.round())
        assert integers.min() >= 0
        assert integers.max() <= 2**bits - 1


@given(weight=any_weight, zero_point=kinds)
def test_scales_are_positive_and_exact_in_fp16(weight, zero_point):
    _, parameters, _ = round_trip(weight, Grid(4, GROUP, zero_point))
    assert torch.equal(parameters.scale, parameters.scale.half().float())
    assert bool((parameters.scale > 0).all())
    assert bool(torch.isfinite(parameters.scale).all())


@given(weight=any_weight, zero_point=kinds, bits=bit_widths)
def test_the_error_is_at_most_half_a_step_and_what_rounding_the_scale_to_fp16_cuts_off(weight, zero_point, bits):
    """Δ is rounded, so its grid ends up to `levels · |Δ - range / levels|` before the range does; else half a step."""
    grid = Grid(bits, GROUP, zero_point)
    _, (scale, _), dequantized = round_trip(weight, grid)
    low, high = group_range(weight, grid)
    reach = (high - low).double() if zero_point else torch.maximum(-low, high).double()
    levels = grid.levels if zero_point else grid.levels // 2
    cut_off = (reach - levels * scale.double()).clamp(min=0)
    allowed = (0.5 * scale.double() + cut_off) * (1 + 1e-6)
    error = (dequantized.double() - weight.double()).abs()
    assert bool((error <= per_channel(allowed, grid)).all())


@given(weight=any_weight, zero_point=kinds, bits=bit_widths, column=st.integers(0, 2 * GROUP - 1))
def test_zero_stays_exactly_zero(weight, zero_point, bits, column):
    weight = weight.clone()
    weight[:, column] = 0
    assert bool((quantize_dequantize(weight, Grid(bits, GROUP, zero_point))[:, column] == 0).all())


@given(weight=any_weight, zero_point=kinds, bits=bit_widths)
def test_quantizing_again_with_the_same_parameters_gives_the_same_codes(weight, zero_point, bits):
    grid = Grid(bits, GROUP, zero_point)
    codes, parameters, dequantized = round_trip(weight, grid)
    assert torch.equal(quantize(dequantized, parameters, grid), codes)


@given(weight=any_weight)
def test_quantizing_again_with_a_range_of_its_own_is_exact_on_a_symmetric_grid(weight):
    """max|w| always lands on the grid's end, so the second range is the first grid's."""
    grid = Grid(4, GROUP, zero_point=False)
    once = quantize_dequantize(weight, grid)
    assert torch.equal(quantize_dequantize(once, grid), once)


@given(weight=any_weight)
def test_quantizing_again_with_a_range_of_its_own_is_exact_where_an_asymmetric_grid_was_used_to_both_ends(weight):
    """Where both code 0 and code 15 occur. A group whose range is nearly centred may use 0 … 14 only: see below."""
    grid = Grid(4, GROUP, zero_point=True)
    codes, _, once = round_trip(weight, grid)
    groups = grid.groups(codes)
    used_whole = (groups.amin(dim=-1) == 0) & (groups.amax(dim=-1) == grid.levels)
    twice = quantize_dequantize(once, grid)
    used_whole = per_channel(used_whole, grid)
    assert torch.equal(twice[used_whole], once[used_whole])


def test_a_centred_range_may_leave_the_last_code_unused():
    """Why the property above has its condition: Δ rounded up in fp16, z = 7, and the largest weight gets code 14."""
    grid = Grid(4, 2, zero_point=True)
    weight = torch.tensor([[-7.5, 7.5]]) * (1 - 2**-12)
    codes, parameters, once = round_trip(weight, grid)
    assert parameters.scale.item() == 1.0
    assert codes.tolist() == [[0, 14]]
    assert not torch.equal(quantize_dequantize(once, grid), once)


@BOTH_KINDS
def test_zeros_stay_zeros_with_a_scale_that_fp16_can_hold(zero_point):
    grid = Grid(4, GROUP, zero_point)
    codes, parameters, dequantized = round_trip(torch.zeros(2, GROUP), grid)
    assert bool((dequantized == 0).all())
    assert bool((parameters.scale.half() > 0).all())
    assert torch.equal(codes, per_channel(parameters.zero, grid))


@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -0.37, 1e-3, -250.0])
def test_a_constant_group_is_kept_to_the_precision_of_its_scale(value):
    """It lies on the grid's end: off by the rounding of Δ to fp16, 2⁻¹¹, at most."""
    for zero_point in (True, False):
        weight = torch.full((1, GROUP), value)
        dequantized = quantize_dequantize(weight, Grid(4, GROUP, zero_point))
        torch.testing.assert_close(dequantized, weight, rtol=2**-11, atol=0)


def test_one_sided_weights_use_the_whole_asymmetric_grid():
    grid = Grid(4, GROUP, zero_point=True)
    positive = torch.linspace(0.5, 7.5, GROUP).unsqueeze(0)
    assert group_parameters(group_range(positive, grid), grid).zero.item() == 0
    assert group_parameters(group_range(-positive, grid), grid).zero.item() == 15


@BOTH_KINDS
def test_a_huge_value_costs_its_own_group_only(zero_point):
    grid = Grid(4, GROUP, zero_point)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 2 * GROUP, generator=generator)
    with_outlier = weight.clone()
    with_outlier[:, 1] = 6e4
    plain, disturbed = quantize_dequantize(weight, grid), quantize_dequantize(with_outlier, grid)
    assert torch.equal(plain[:, GROUP:], disturbed[:, GROUP:])
    assert bool((disturbed[:, 2:GROUP] == 0).all())
    torch.testing.assert_close(disturbed[:, 1], with_outlier[:, 1], rtol=2**-11, atol=0)


@BOTH_KINDS
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_beyond_the_reach_of_fp16_scales_saturate_and_stay_finite(zero_point, sign):
    weight = torch.tensor([[1e7, 3e6, 5.0, 0.0]]) * sign
    dequantized = quantize_dequantize(weight, Grid(4, 4, zero_point))
    levels = 15 if zero_point else 7 if sign > 0 else 8
    largest = sign * levels * torch.finfo(torch.float16).max
    assert dequantized.tolist() == [[largest, largest, 0.0, 0.0]]


@BOTH_KINDS
@pytest.mark.parametrize("magnitude", [1e-7, 1e-6])
def test_weights_below_the_smallest_range_become_small_multiples_of_its_step(zero_point, magnitude):
    grid = Grid(4, GROUP, zero_point)
    weight = torch.randn(4, GROUP, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) * magnitude
    _, (scale, _), dequantized = round_trip(weight, grid)
    torch.testing.assert_close(scale, torch.full_like(scale, MIN_RANGE / (15 if zero_point else 7)), rtol=0.05, atol=0)
    assert bool(((dequantized - weight).abs() <= 0.5 * per_channel(scale, grid) * (1 + 1e-6)).all())


@BOTH_KINDS
def test_one_group_for_the_whole_row_has_one_scale_per_row(zero_point):
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, resolve_group_size(-1, 40), zero_point)
    codes, parameters, dequantized = round_trip(weight, grid)
    assert parameters.scale.shape == parameters.zero.shape == (3, 1)
    expected_codes, _, _, expected = reference(weight, grid)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(dequantized, expected)


def test_group_size_minus_one_is_the_whole_row_and_others_are_kept():
    assert resolve_group_size(-1, 384) == 384
    assert [resolve_group_size(size, 384) for size in (32, 64, 128)] == [32, 64, 128]


@given(weight=any_weight)
def test_a_range_holds_zero_and_every_weight_of_its_group(weight):
    grid = Grid(4, GROUP, True)
    low, high = group_range(weight, grid)
    assert low.shape == high.shape == (weight.shape[0], 2)
    assert bool(((low <= 0) & (high >= 0)).all())
    assert bool(((per_channel(low, grid) <= weight) & (weight <= per_channel(high, grid))).all())


@given(weight=weights, zero_point=kinds)
def test_rows_and_groups_are_independent(weight, zero_point):
    grid = Grid(4, GROUP, zero_point)
    whole = quantize_dequantize(weight, grid)
    one_by_one = [
        [quantize_dequantize(weight[row : row + 1, g * GROUP : (g + 1) * GROUP], grid) for g in range(2)]
        for row in range(weight.shape[0])
    ]
    assert torch.equal(whole, torch.cat([torch.cat(groups, dim=1) for groups in one_by_one]))


def test_inputs_are_left_as_they_were():
    grid = Grid(4, GROUP, True)
    weight = torch.randn(2, GROUP)
    before = weight.clone()
    codes, parameters, _ = round_trip(weight, grid)
    codes_before, parameters_before = codes.clone(), [p.clone() for p in parameters]
    dequantize(codes, parameters, grid)
    quantize_dequantize(weight, grid)
    assert torch.equal(weight, before)
    assert torch.equal(codes, codes_before)
    assert all(torch.equal(p, q) for p, q in zip(parameters, parameters_before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weight_is_kept(dtype):
    weight = torch.randn(2, GROUP).to(dtype)
    codes, parameters, dequantized = round_trip(weight, Grid(4, GROUP, True))
    assert {codes.dtype, parameters.scale.dtype, parameters.zero.dtype, dequantized.dtype} == {dtype}
    assert torch.equal(parameters.scale, parameters.scale.half().to(dtype))
