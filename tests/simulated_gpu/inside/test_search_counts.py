"""The scale search: kernels, waits of the host for a whole layer, and what it leaves in the device's memory."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from models import tiny_llama, tiny_mixtral, token_recipe
from simulated_gpu.by_line import CountsByLine
from torch import Tensor
from transformers import PreTrainedModel

from hf_awq_offload import quantize_model
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.pipeline import layer_quantization
from hf_awq_offload.pipeline.layer_quantization import search_group_scales
from hf_awq_offload.search.chunks import chunks_of_at_most
from hf_awq_offload.search.row_blocks import row_blocks
from hf_awq_offload.search.scale import ScaleSearch, _row_samples, sampled_losses, search_scale
from hf_awq_offload.search.statistics import InputStatistics

ROUNDING = re.compile(r"search/(rounding|feedback_kernel|feedback_state|feedback|factorization|large_products)\.py:")
"""Channel orders and rounding, which the ranking by error feedback calls, have counts of their own."""
GPU = torch.device("cuda", 0)
IN, GROUP = 96, 32


def counts(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, **recipe: object) -> tuple[int, int]:
    """Returns kernels and waits of the scale search of a model's only layer, without those of rounding."""
    lines = CountsByLine()

    def watched(*args):
        with lines:
            return search_group_scales(*args)

    monkeypatch.setattr(layer_quantization, "search_group_scales", watched)
    quantize_model(model.to(torch.bfloat16), token_recipe(execution_device=str(GPU), n_grid=20, **recipe))

    def total(by_line: Counter[str]) -> int:
        return sum(number for line, number in by_line.items() if not ROUNDING.match(line))

    kernels, waits = total(lines.launches), total(lines.waits)
    print(f"{kernels} kernels, {waits} waits")
    return kernels, waits


@pytest.mark.parametrize(("rounding", "most_kernels", "most_waits"), [("error_feedback", 1050, 6), ("nearest", 900, 5)])
def test_few_kernels_and_waits_for_a_dense_layer(rounding, most_kernels, most_waits, monkeypatch):
    """Its four groups take five or six steps: candidates, coarse, fine, with error feedback, the winner, a fallback."""
    kernels, waits = counts(monkeypatch, tiny_llama(num_hidden_layers=1), rounding=rounding)
    assert kernels <= most_kernels
    assert waits <= most_waits


def test_experts_add_kernels_but_no_waits(monkeypatch):
    few = counts(monkeypatch, tiny_mixtral(num_hidden_layers=1, num_local_experts=2))
    many = counts(monkeypatch, tiny_mixtral(num_hidden_layers=1, num_local_experts=6))
    assert (many[0] - few[0]) / 4 <= 250
    assert max(few[1], many[1]) <= 6


def test_statistics_that_wait_in_ram_come_one_after_another_and_leave_nothing(monkeypatch):
    left: list[int] = []
    grams: list[int] = []
    original = InputStatistics.to

    def watched(statistics: InputStatistics, device: torch.device) -> InputStatistics:
        left.append(torch.cuda.memory_allocated())
        grams.append(4 * statistics.gram.numel())
        return original(statistics, device)

    def in_ram(context, groups, device):
        monkeypatch.setattr(InputStatistics, "to", watched)
        in_ram = [(group, original(statistics, torch.device("cpu"))) for group, statistics in groups]
        before = torch.cuda.memory_allocated()
        found = search_group_scales(context, in_ram, device)
        monkeypatch.setattr(InputStatistics, "to", original)
        assert all(each - before < min(grams) for each in left), "a gram matrix stayed on the device"
        assert torch.cuda.memory_allocated() - before < min(grams)
        return found

    monkeypatch.setattr(layer_quantization, "search_group_scales", in_ram)
    quantize_model(
        tiny_llama(num_hidden_layers=1, hidden_size=128, intermediate_size=256).to(torch.bfloat16),
        token_recipe(execution_device=str(GPU), rounding="nearest"),
    )
    assert len(left) == 4


def case(device: torch.device) -> tuple[list[Tensor], InputStatistics, list[Grid]]:
    """Returns weights of three linears under two grids, and statistics of a common input with loud channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, IN, generator=generator) * torch.exp(torch.randn(IN, generator=generator))
    weights = [0.1 * torch.randn(rows, IN, generator=generator) for rows in (200, 120, 80)]
    statistics = InputStatistics(x.t() @ x / len(x), x.abs().mean(dim=0), len(x))
    grids = [Grid(4, GROUP, True), Grid(4, GROUP, True), Grid(3, IN, False)]
    return [weight.to(device) for weight in weights], statistics.to(device), grids


def found(device: torch.device, with_feedback: bool) -> ScaleSearch:
    weights, statistics, grids = case(device)
    return search_scale(
        weights, statistics, grids, n_grid=20, duo_scaling=True, row_of_channel=torch.arange(IN), rows=IN,
        with_feedback=with_feedback,
    )  # fmt: skip


@pytest.mark.parametrize("most", [None, 40 * IN])
@pytest.mark.parametrize("with_feedback", [False, True])
def test_many_candidates_at_a_time_find_what_a_cpu_finds_one_by_one(with_feedback, most):
    ours = found(torch.device("cpu"), with_feedback)
    with chunks_of_at_most(most):
        theirs = found(GPU, with_feedback)
    assert theirs.alpha == ours.alpha is not None
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
    torch.testing.assert_close(theirs.channel_scale.cpu(), ours.channel_scale, rtol=1e-4, atol=0)


def test_sampled_losses_are_the_same_in_batches_of_any_size():
    weights, statistics, grids = case(GPU)
    samples = _row_samples(weights, grids, torch.rand(400, generator=torch.Generator().manual_seed(0)))
    scales = [*torch.exp(0.3 * torch.randn(7, IN, generator=torch.Generator().manual_seed(1))).to(GPU)]
    together = sampled_losses(samples, statistics.gram, scales)
    for most in (3 * IN, 500 * IN):
        with chunks_of_at_most(most):
            torch.testing.assert_close(sampled_losses(samples, statistics.gram, scales), together, rtol=1e-5, atol=0)
    assert len(samples) == 2  # one per grid
    assert len(together.unique()) == 7


@pytest.mark.parametrize("most", [None, 210 * IN, 30 * IN])
def test_small_weights_of_one_grid_share_a_block_in_their_order(most):
    weights, _, grids = case(GPU)
    with chunks_of_at_most(most):
        blocks = [*row_blocks(weights, grids)]
    assert torch.equal(torch.cat([rows for rows, _ in blocks]), torch.cat(weights))
    assert all(rows.numel() <= (most or 320 * IN) for rows, _ in blocks)
    assert sum(len(rows) for rows, grid in blocks if grid == grids[0]) == 320
    if most is None:
        assert len(blocks) == 2
