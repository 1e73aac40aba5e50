"""Tests reading factors from the inputs before and after rows were scaled."""

from __future__ import annotations

import pytest
import torch

from hf_awq_offload.model.row_maps import LEVELS, factor_index, level_factors

FACTORS = level_factors(torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 6])
def test_channels_in_which_large_terms_cancel_are_read_too(tokens):
    """Some of the many channels are nearly zero for a single token, so that rounding errors are relatively large."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8192, 256, generator=generator), torch.randn(tokens, 256, generator=generator)
    for row in range(0, 8192, 64):  # almost orthogonal to all tokens
        weight[row] -= torch.linalg.lstsq(x, x @ weight[row] - 0.005).solution
    digits = torch.randint(LEVELS, (8192,), generator=generator)
    before, after = x @ weight.T, x @ (weight * FACTORS[digits, None]).T
    off = (after / before / FACTORS[digits] - 1).abs()
    assert float(off.max()) > 1e-3  # so such channels exist
    found, fits = factor_index(before, after, FACTORS)
    assert bool(fits)
    assert torch.equal(found, digits)


@pytest.mark.parametrize("deviation", [0.005, -0.005, 0.02])
def test_an_ordinary_channel_that_is_no_exact_multiple_refuses(deviation):
    before = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    after = before * FACTORS[torch.arange(64) % LEVELS]
    assert bool(factor_index(before, after, FACTORS)[1])
    after[:, 17] *= 1 + deviation
    assert not bool(factor_index(before, after, FACTORS)[1])


def test_a_channel_that_changes_from_token_to_token_refuses():
    before = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    after = before * FACTORS[3]
    after[0, 5] *= 1.1
    assert not bool(factor_index(before, after, FACTORS)[1])


def test_a_dead_channel_is_unknown():
    before = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    before[:, 2] = 0
    found, fits = factor_index(before, before * FACTORS[7], FACTORS)
    assert bool(fits)
    assert found.tolist() == [7, 7, -1, 7, 7, 7, 7, 7]
