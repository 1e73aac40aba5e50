"""The bytes that the scale search is said to hold are those that it holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.search import feedback_ranking
from hf_awq_offload.search.chunks import chunks_of_at_most
from hf_awq_offload.search.feedback_ranking import feedback_losses
from hf_awq_offload.search.loss import RowSample
from hf_awq_offload.search.ranking_memory import (
    FEEDBACK_CANDIDATES,
    MOST_CANDIDATES,
    GroupShape,
    feedback_ranking_bytes,
    sampled_loss_bytes,
    sampled_rows,
    whole_loss_bytes,
)
from hf_awq_offload.search.scale import mean_relative_magnitude, sampled_losses, weights_mse

GPU = torch.device("cuda", 0)
N_GRID = 20
SHAPES = pytest.mark.parametrize(
    "shape", [GroupShape(1000, 512, 128), GroupShape(3000, 256, 32), GroupShape(200, 1024, 1024)], ids=str
)
MOST = pytest.mark.parametrize("most", [None, 2**18, 2**16])
SLACK = 1.15


@pytest.fixture(autouse=True)
def no_cached_blocks():
    """A cached block that is a little too large is given whole, and would count as taken."""
    torch.cuda.empty_cache()


def peak_above(before: int, step: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(GPU)


def assert_close_above(predicted: int, measured: int) -> None:
    """The allocator rounds every tensor up to 512 bytes."""
    print(f"{predicted} bytes predicted, {measured} measured: {predicted / measured:.3f}")
    assert measured <= predicted + 20 * 512
    assert predicted <= SLACK * measured


@MOST
@SHAPES
def test_of_the_loss_on_all_rows(shape, most):
    rows, channels, group_size = shape
    weights = [random(part, channels).bfloat16() for part in (rows // 2, rows - rows // 2)]
    grids, gram, scale = [Grid(4, group_size, True)] * 2, random(channels, channels), random(channels).exp()
    before = torch.cuda.memory_allocated()
    with chunks_of_at_most(most):
        predicted = whole_loss_bytes(shape)
        assert_close_above(predicted, peak_above(before, lambda: weights_mse(weights, grids, gram, scale)))
        assert peak_above(before, lambda: mean_relative_magnitude(weights, grids)) <= predicted + 20 * 512


@MOST
@SHAPES
def test_of_the_losses_of_candidates(shape, most):
    _, channels, group_size = shape
    rows = sampled_rows(shape)
    gram, before = random(channels, channels), torch.cuda.memory_allocated()
    sample = RowSample(random(rows, channels), Grid(4, group_size, True), torch.ones(rows, device=GPU).double())
    scales = [*random(2 * N_GRID, channels).exp()]  # as candidates are kept by rows and by channels
    with chunks_of_at_most(most):
        measured = peak_above(before, lambda: sampled_losses([sample], gram, scales[:MOST_CANDIDATES]))
        assert_close_above(sampled_loss_bytes(shape, N_GRID), measured)


@MOST
@SHAPES
def test_of_what_is_held_while_candidates_are_rounded_with_error_feedback(shape, most, monkeypatch):
    _, channels, group_size = shape
    rows = sampled_rows(shape)
    gram = torch.eye(channels, device=GPU)
    before = torch.cuda.memory_allocated()
    sample = RowSample(random(rows, channels), Grid(4, group_size, True), torch.ones(rows, device=GPU).double())
    scales = [*random(2 * N_GRID, channels).mul_(0.1).exp_()]
    held: list[int] = []

    def watched(weight: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        held.append(torch.cuda.max_memory_allocated() - before)
        return weight, torch.zeros(len(weight), device=GPU)

    order = feedback_ranking.feedback_order(gram)
    monkeypatch.setattr(feedback_ranking, "round_with_feedback", watched)
    monkeypatch.setattr(feedback_ranking, "feedback_order", lambda gram, factors: order)
    with chunks_of_at_most(most):
        torch.cuda.reset_peak_memory_stats()
        feedback_losses([sample], gram, scales[0], scales[:FEEDBACK_CANDIDATES])
        assert_close_above(feedback_ranking_bytes(shape, N_GRID), max(held))
