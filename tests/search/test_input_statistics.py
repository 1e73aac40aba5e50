"""Statistics that are pooled, blended and divided are those of the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_awq_offload.search.statistics import InputStatistics, blended, pooled


def inputs(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 6, generator=generator) * (1 + torch.rand(6, generator=generator))


def of(x: Tensor) -> InputStatistics:
    return InputStatistics(x.t() @ x / len(x), x.abs().mean(dim=0), len(x))


def of_nothing() -> InputStatistics:
    return InputStatistics(torch.zeros(6, 6), torch.zeros(6), 0)


def assert_same(found: InputStatistics, expected: InputStatistics) -> None:
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.mean_abs, expected.mean_abs)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("sizes", [[1], [5], [3, 8], [1, 1, 20], [4, 4, 4, 4]])
def test_pooled_are_those_of_all_tokens_together(sizes):
    parts = [inputs(tokens, seed) for seed, tokens in enumerate(sizes)]
    assert_same(pooled([of(part) for part in parts]), of(torch.cat(parts)))


def test_an_input_without_tokens_adds_nothing_to_the_pool():
    x = inputs(7, 0)
    assert_same(pooled([of_nothing(), of(x), of_nothing()]), of(x))
    assert_same(pooled([of_nothing()]), of_nothing())


@pytest.mark.parametrize(("own_tokens", "min_tokens"), [(4, 16), (1, 2), (15, 16)])
def test_blended_are_those_of_enough_tokens_of_which_the_pool_gives_the_missing_ones(own_tokens, min_tokens):
    own, pool = inputs(own_tokens, 1), inputs(min_tokens - own_tokens, 2)
    assert_same(blended(of(own), of(pool), min_tokens), of(torch.cat([own, pool])))


def test_an_input_without_tokens_gets_those_of_the_pool():
    x = inputs(9, 0)
    found = blended(of_nothing(), of(x), 5)
    assert_same(found, InputStatistics(of(x).gram, of(x).mean_abs, 5))


@pytest.mark.parametrize("tokens", [8, 9])
def test_an_input_with_enough_tokens_is_left_alone(tokens):
    own = of(inputs(tokens, 1))
    assert blended(own, of(inputs(5, 2)), 8) is own


def test_divided_are_those_of_the_divided_input():
    x, scale = inputs(11, 3), torch.rand(6) + 0.5
    assert_same(of(x).divided(scale), of(x / scale))
