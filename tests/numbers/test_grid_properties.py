"""Pure functions on weights of any magnitude: never NaN, never off the grid, never worse than rounding to nearest.

Exponents go to the ends of fp32. What the pipeline refuses (weight_checks.py) the functions still have to survive.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_awq_offload.errors import ConfigError
from hf_awq_offload.formats.grid import (
    MIN_RANGE,
    SCALE_DTYPE,
    Grid,
    dequantize,
    exact_scale,
    group_parameters,
    group_range,
    largest_scale,
    quantize,
    quantize_dequantize,
)
from hf_awq_offload.formats.grid_choice import BITS, GROUP_SIZES, GridFields, checked_overrides, choice_for, choices
from hf_awq_offload.search.clip import search_clip
from hf_awq_offload.search.loss import row_mse
from hf_awq_offload.search.rounding import feedback_order, round_weight
from hf_awq_offload.search.scale import search_scale
from hf_awq_offload.search.statistics import InputStatistics

IN, OUT, GROUP = 32, 6, 16

grids = st.builds(
    Grid,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([GROUP, IN]),
    zero_point=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)


tokens_, powers, seeds = st.integers(1, 80), st.integers(-20, 15), st.integers(0, 99)


@st.composite
def weights(draw: st.DrawFn, least: float = -44.0, most: float = 37.0) -> Tensor:
    """Draws a weight (OUT, IN) whose rows, channels and single values each have a magnitude of their own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    exponents = st.floats(least, most)
    middle, spread = draw(exponents), draw(st.sampled_from([0.0, 1.0, 10.0]))
    rows, columns = (torch.randn(n, generator=generator) * spread for n in (OUT, IN))
    powers = (middle + rows[:, None] + columns).clamp(least, most).double()
    weight = (torch.randn(OUT, IN, generator=generator).clamp(-3, 3).double() * 10**powers).float()
    for value in draw(st.lists(exponents, max_size=3)):
        row, column = draw(st.integers(0, OUT - 1)), draw(st.integers(0, IN - 1))
        weight[row, column] = draw(st.sampled_from([1.0, -1.0])) * 10**value
    if draw(st.booleans()):
        weight[:, draw(st.sampled_from([0, GROUP])) :][:, :GROUP] = 0
    return weight


@given(weight=weights(), grid=grids)
def test_codes_are_on_the_grid_and_scales_can_be_stored(weight, grid):
    parameters = group_parameters(group_range(weight, grid), grid)
    assert bool(parameters.scale.isfinite().all())
    assert bool((parameters.scale > 0).all())
    assert torch.equal(parameters.scale.to(SCALE_DTYPE).float(), parameters.scale)
    assert bool(((parameters.zero >= 0) & (parameters.zero <= grid.levels)).all())
    codes = quantize(weight, parameters, grid)
    assert torch.equal(codes, codes.round().clamp(0, grid.levels))
    assert torch.equal(dequantize(codes, parameters, grid), quantize_dequantize(weight, grid))


@given(weight=weights(most=3.0), grid=grids)
def test_within_what_can_be_stored_the_error_is_at_most_a_step(weight, grid):
    """Half a step from rounding, and up to half a step at the ends, where the zero point is rounded. The step itself is
    rounded as it is stored; below the least normal number of fp16 by up to its least step."""
    parameters = group_parameters(group_range(weight, grid), grid)
    step = exact_scale(group_range(weight, grid), grid)
    stored_step = torch.maximum(step * (1 + 2.0**-8), step + 2.0**-24)
    error = (dequantize(quantize(weight, parameters, grid), parameters, grid) - weight).abs()
    rounding_of_step = (parameters.scale - step).abs() * grid.levels
    most = (stored_step + rounding_of_step).repeat_interleave(grid.group_size, dim=1)
    assert bool((error <= most * (1 + 1e-5)).all())


@given(weight=weights(), grid=grids)
def test_what_is_beyond_the_largest_scale_is_what_exact_scale_says(weight, grid):
    """The refusal is exact: a group is cut off if and only if its exact scale is larger than the largest."""
    step, stored = exact_scale(group_range(weight, grid), grid), group_parameters(group_range(weight, grid), grid).scale
    cut_off = step > largest_scale(grid) * (1 + 2.0**-7)
    assert bool((stored[cut_off] == largest_scale(grid)).all())
    assert bool((stored[step < largest_scale(grid)] <= largest_scale(grid)).all())


@given(
    weight=weights(most=4.0), grid=grids, tokens=st.integers(1, 80), power=st.integers(-20, 15), seed=st.integers(0, 99)
)
def test_rounding_is_never_worse_than_nearest_and_its_losses_are_those_of_its_codes(weight, grid, tokens, power, seed):
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    gram = x.t() @ x / tokens
    nearest = round_weight(weight, gram, grid)
    clipped = search_clip(weight, gram, grid)
    rounded = round_weight(weight, gram, grid, clipped=clipped, order=feedback_order(gram))
    assert bool(rounded.mse.isfinite().all())
    assert bool((rounded.mse <= nearest.mse).all())
    assert torch.equal(rounded.codes, rounded.codes.round().clamp(0, grid.levels))
    assert torch.equal(rounded.parameters.scale.to(SCALE_DTYPE).float(), rounded.parameters.scale)
    ours, theirs = (
        row_mse(dequantize(each.codes, each.parameters, grid).double() - weight.double(), gram.double())
        for each in (rounded, nearest)
    )
    magnitude = row_mse(weight.double().abs(), gram.double().abs())  # errors of sums in fp32 are relative to this
    assert bool((ours <= theirs * (1 + 1e-3) + 1e-6 * magnitude).all())


@given(
    weight=weights(most=4.0), grid=grids, tokens=st.integers(1, 80), power=st.integers(-20, 15), seed=st.integers(0, 99)
)
def test_the_scale_that_is_chosen_is_finite_positive_and_no_worse_than_none(weight, grid, tokens, power, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(IN, generator=generator)
    x = torch.randn(tokens, IN, generator=generator) * 10.0 ** (power + spread)
    statistics = InputStatistics(x.t() @ x / tokens, x.abs().mean(dim=0), tokens)
    for with_feedback in (False, True):
        found = search_scale(
            [weight], statistics, [grid], n_grid=4, duo_scaling=True, row_of_channel=torch.arange(IN), rows=IN,
            with_feedback=with_feedback,
        )  # fmt: skip
        assert bool((found.row_scale > 0).all())
        assert bool(found.row_scale.isfinite().all())
        assert found.loss <= found.identity_loss


def test_weights_below_the_least_range_become_zero_and_no_nan():
    grid = Grid(4, GROUP, zero_point=True)
    for magnitude in (0.0, 1e-45, 1e-40, MIN_RANGE / 100):
        result = quantize_dequantize(torch.full((OUT, IN), magnitude), grid)
        assert torch.equal(result, torch.zeros(OUT, IN))


fields = st.fixed_dictionaries(
    {},
    optional={"bits": st.sampled_from(BITS), "group_size": st.sampled_from(GROUP_SIZES), "zero_point": st.booleans()},
).filter(bool)
base_fields = st.builds(GridFields, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.none() | st.booleans())


@given(
    base=base_fields,
    overrides=st.dictionaries(st.sampled_from(["mlp", "q_proj$", r"\.0\.", "layers"]), fields, max_size=4),
    name=st.sampled_from(["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"]),
)
def test_the_grid_of_a_name_is_among_all_that_may_be_chosen(base, overrides, name):
    checked = checked_overrides(overrides, base)
    chosen = choice_for(name, base, checked)
    assert chosen in choices(base, checked)
    assert chosen.bits in BITS
    assert chosen.group_size in GROUP_SIZES
    assert isinstance(chosen.zero_point, bool)


@given(
    value=st.floats() | st.integers() | st.text(max_size=3) | st.none(), field=st.sampled_from(["bits", "group_size"])
)
def test_any_other_value_is_refused_by_name(value, field):
    if type(value) is int and value in {"bits": BITS, "group_size": GROUP_SIZES}[field]:
        return
    with pytest.raises(ConfigError, match=rf"overrides\['mlp'\]: {field} is "):
        checked_overrides({"mlp": {field: value}}, GridFields(4, 128, None))
