"""Collects weights and statistics of the shipped model, for tests of the searches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_awq_offload.calibration.statistics_collector import StatisticsCollector
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.search.scale import ScaleSearch, search_scale
from hf_awq_offload.search.statistics import InputStatistics

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]

Case = tuple[list[Tensor], InputStatistics]


def shipped_groups(folder: Path) -> list[Case]:
    """Returns all input groups of the shipped model, with statistics of 4096 tokens of the held-out text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    token_ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids
    layers = list(enumerate(model.model.layers))
    linears = {f"{i}.{names[0]}": layer.get_submodule(names[0]) for i, layer in layers for names in GROUPS}
    collector = StatisticsCollector(linears, torch.device("cpu"))
    with collector.collecting(), torch.no_grad():
        model(input_ids=token_ids[:, :4096].reshape(8, 512), use_cache=False)
    return [
        ([layer.get_parameter(f"{name}.weight").detach() for name in names], collector.take(f"{i}.{names[0]}", ""))
        for i, layer in layers
        for names in GROUPS
    ]


def search(case: Case, grid: Grid, with_feedback: bool) -> ScaleSearch:
    """Runs the search with its defaults, where every channel has a scale of its own."""
    weights, statistics = case
    channels = statistics.gram.shape[0]
    return search_scale(
        weights, statistics, [grid] * len(weights), n_grid=20, duo_scaling=True,
        row_of_channel=torch.arange(channels), rows=channels, with_feedback=with_feedback,
    )  # fmt: skip
