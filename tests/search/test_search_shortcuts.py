"""Tests sampled rows and coarse steps against the exhaustive searches, on the statistics of the shipped model."""

from __future__ import annotations

import pytest
import torch
from shipped_groups import Case, search, shipped_groups
from torch import Tensor

import hf_awq_offload.search.clip
import hf_awq_offload.search.scale
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.search.clip import search_clip
from hf_awq_offload.search.rounding import round_weight
from hf_awq_offload.search.scale import ScaleSearch

GRIDS = [Grid(4, 128, True), Grid(4, 32, True), Grid(3, 128, True), Grid(4, 64, False)]
pytestmark = pytest.mark.xdist_group("shortcuts")


@pytest.fixture(scope="module")
def groups(tiny_llama_dir) -> list[Case]:
    return shipped_groups(tiny_llama_dir)


def searches(groups: list[Case]) -> list[ScaleSearch]:
    return [search(case, grid, with_feedback=False) for grid in GRIDS for case in groups]


def test_the_scale_found_is_within_a_percent_of_the_exhaustive_search_on_nearly_all_groups(groups, monkeypatch):
    found = searches(groups)
    monkeypatch.setattr(hf_awq_offload.search.scale, "SAMPLE_ROWS", 2**20)
    monkeypatch.setattr(hf_awq_offload.search.scale, "COARSE_STEP", 1)
    best = searches(groups)
    close = [ours.loss <= 1.01 * exhaustive.loss for ours, exhaustive in zip(found, best, strict=True)]
    print(f"{sum(close)} of {len(close)} groups within 1 %")
    assert len(close) == 64
    assert sum(close) >= 0.95 * len(close)


def test_the_clipping_ranges_found_cost_hardly_more_than_those_of_all_steps(groups, monkeypatch):
    def losses() -> Tensor:
        linears = [(weight, each.gram, grid) for weights, each in groups for weight in weights for grid in GRIDS]
        return torch.tensor([float(round_weight(*each, clipped=search_clip(*each)).mse.sum()) for each in linears])

    found = losses()
    monkeypatch.setattr(hf_awq_offload.search.clip, "COARSE_STEP", 1)
    ratio = found / losses()
    print(f"loss relative to all steps: mean {float(ratio.mean()):.3f}, 95 % below {float(ratio.quantile(0.95)):.3f}")
    assert len(ratio) == 112
    assert float(ratio.mean()) <= 1.02
    assert float(ratio.quantile(0.95)) <= 1.05
