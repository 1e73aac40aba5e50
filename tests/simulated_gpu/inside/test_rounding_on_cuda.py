"""Rounding with error feedback on a GPU: what it takes, how often it waits, and that it agrees with the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from simulated_gpu import observed
from torch import Tensor

from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.search import factorization_in_place, gram_matrix, large_products
from hf_awq_offload.search.chunks import chunks_of_at_most
from hf_awq_offload.search.clip import search_clip
from hf_awq_offload.search.gram_matrix import GramInRam, block_bytes
from hf_awq_offload.search.rounding import FeedbackOrder, feedback_order, round_weight
from hf_awq_offload.search.working_memory import ordering_bytes, ordering_in_place_bytes, rounding_bytes


def gram_matrix_of(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * channels, channels // 4, generator=generator)
    x = x @ torch.randn(channels // 4, channels, generator=generator)
    x += 0.5 * torch.randn(x.shape, generator=generator)
    return x.t() @ x / len(x)


def random_weight(rows: int, channels: int) -> Tensor:
    return 0.05 * torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))


def peak_bytes(function: Callable[[], object]) -> int:
    """Returns what `function` allocates at most, its result included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def waits(function: Callable[[], object]) -> int:
    observed.reset_counters()
    function()
    return observed.counters()["synchronizations"]


@pytest.mark.parametrize("channels", [128, 200, 512, 1024])
def test_ordering_takes_the_memory_that_is_planned(channels):
    gram = torch.eye(channels).cuda()
    taken, planned = peak_bytes(lambda: feedback_order(gram)), ordering_bytes(channels)
    assert taken <= planned <= 1.15 * taken
    assert taken < 2.25 * gram.nbytes + 2**15


@pytest.mark.parametrize(
    ("rows", "channels", "group_size", "elements"),
    [
        (512, 512, 64, None),
        (512, 512, 64, 2**16),
        (512, 512, 512, 2**16),
        (2048, 256, 32, 2**17),
        (2048, 256, 32, 2**12),
        (300, 768, 32, 2**15),
        (100, 2048, 16, 2**20),  # the equations for the scales are larger than the weight
        (100, 2048, 32, None),
    ],
)
@pytest.mark.parametrize("clip", [False, True], ids=["full range", "clip"])
def test_rounding_takes_the_memory_that_is_planned(rows, channels, group_size, elements, clip):
    grid, weight, gram = (
        Grid(4, group_size, True),
        random_weight(rows, channels).cuda(),
        gram_matrix_of(channels).cuda(),
    )
    order = feedback_order(gram)
    with chunks_of_at_most(elements):
        clipped = search_clip(weight, gram, grid) if clip else None
        taken = peak_bytes(lambda: round_weight(weight, gram, grid, clipped=clipped, order=order))
    assert taken <= rounding_bytes(rows, channels, group_size, elements) <= 1.15 * taken


@pytest.mark.parametrize("scaled", [False, True], ids=["as collected", "scaled"])
def test_a_matrix_that_stays_in_ram_takes_the_memory_that_is_planned(scaled, monkeypatch):
    """Its factor is the only matrix on the device, beside blocks of rows."""
    monkeypatch.setattr(gram_matrix, "BLOCK_CHANNELS", 64)
    monkeypatch.setattr(factorization_in_place, "PANEL_CHANNELS", 64)
    channels, elements = 1024, 2**17
    grid, weight = Grid(4, 64, True), random_weight(512, channels).cuda()
    scale = torch.rand(channels).add_(0.5).cuda() if scaled else None
    gram = GramInRam(gram_matrix_of(channels), weight.device, scale)
    orders: list[FeedbackOrder] = []
    taken = peak_bytes(lambda: orders.append(feedback_order(gram)))
    assert taken <= ordering_in_place_bytes(channels) <= 1.15 * taken
    assert taken < 1.6 * gram.matrix.nbytes
    with chunks_of_at_most(elements):
        clipped = search_clip(weight, gram, grid)
        taken = peak_bytes(lambda: round_weight(weight, gram, grid, clipped=clipped, order=orders[0]))
    assert taken <= rounding_bytes(512, channels, 64, elements) + block_bytes(channels)


@pytest.fixture
def large_from_64(monkeypatch) -> None:
    """Products count as large from 64 rows and columns on, and are made in small pieces."""
    monkeypatch.setattr(large_products, "LEAST_SIDE", 64)
    monkeypatch.setattr(large_products, "TILE", 128)
    monkeypatch.setattr(large_products, "PART_ELEMENTS", 2**15)


@pytest.mark.usefixtures("large_from_64")
def test_products_in_three_parts_take_the_memory_that_is_planned():
    grid, weight, gram = Grid(4, 64, True), random_weight(512, 512).cuda(), gram_matrix_of(512).cuda()
    observed.reset_counters()
    taken, planned = peak_bytes(lambda: feedback_order(gram)), ordering_bytes(512)
    assert taken <= planned <= 1.15 * taken
    order = feedback_order(gram)
    splits = observed.launches_by_operation()["aten::bitwise_and"]
    assert splits > 0
    taken = peak_bytes(lambda: round_weight(weight, gram, grid, order=order))
    assert taken <= rounding_bytes(512, 512, 64) <= 1.15 * taken
    assert observed.launches_by_operation()["aten::bitwise_and"] > splits
    assert large_products.parts_bytes(512, 512, 512) > 0
    assert large_products.parts_bytes(512, 512, 512, 2**20) == 0


@pytest.mark.usefixtures("large_from_64")
def test_products_in_three_parts_round_as_on_the_cpu():
    test_it_rounds_as_on_the_cpu(Grid(4, 32, True), None)


def test_the_host_waits_once_for_an_order_and_never_for_rounding():
    grid, weight, gram = Grid(4, 64, True), random_weight(100, 256).cuda(), gram_matrix_of(256).cuda()
    assert waits(lambda: feedback_order(gram)) == 1
    order = feedback_order(gram)
    assert waits(lambda: round_weight(weight, gram, grid, clipped=search_clip(weight, gram, grid), order=order)) == 0
    assert waits(lambda: round_weight(weight, gram, grid, clipped=search_clip(weight, gram, grid))) == 0


def test_a_kernel_is_launched_for_every_128_channels_and_passes_over_them_twice():
    grid, weight, gram = Grid(4, 64, True), random_weight(100, 1024).cuda(), gram_matrix_of(1024).cuda()
    order = feedback_order(gram)
    observed.reset_counters()
    round_weight(weight, gram, grid, order=order)
    assert observed.launches_by_operation()["block_kernel"] == 2 * 8
    assert observed.launches_by_operation()["aten::addmm"] <= 2 * 7 + 2 * 2  # between blocks, and the error to nearest


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(3, 64, False), Grid(4, 320, True)], ids=str)
@pytest.mark.parametrize("elements", [None, 5000], ids=["whole", "in chunks"])
def test_it_rounds_as_on_the_cpu(grid, elements):
    weight, gram = random_weight(90, 320), gram_matrix_of(320)
    on_cpu = round_weight(weight, gram, grid, clipped=search_clip(weight, gram, grid), order=feedback_order(gram))
    weight, gram = weight.cuda(), gram.cuda()
    with chunks_of_at_most(elements):
        clipped = search_clip(weight, gram, grid)
        found = round_weight(weight, gram, grid, clipped=clipped, order=feedback_order(gram))
    assert float((found.codes.cpu() == on_cpu.codes).float().mean()) > 0.99  # ties may fall the other way
    assert float(found.mse.sum()) == pytest.approx(float(on_cpu.mse.sum()), rel=0.01)
    assert float((found.parameters.scale.cpu() == on_cpu.parameters.scale).float().mean()) > 0.9


def test_a_matrix_that_is_not_positive_is_taken_in_the_order_of_loudness():
    gram = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    gram[1, 3] = gram[3, 1] = -5.0
    assert feedback_order(gram.cuda()).channels.tolist() == [1, 3, 2, 0]
