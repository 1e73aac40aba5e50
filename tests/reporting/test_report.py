"""A run's records say what was done, and can be read back from JSON, from the journal and from older journals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_recipe

from hf_awq_offload import quantize, quantize_model
from hf_awq_offload.formats.grid import Grid, group_range
from hf_awq_offload.offload.journal import Journal
from hf_awq_offload.offload.memory_use import MemoryWatch
from hf_awq_offload.pipeline import layer_quantization
from hf_awq_offload.pipeline.layer_quantization import NO_DATA
from hf_awq_offload.pipeline.scaling import NO_BETTER, NO_PRODUCER, NOT_STORABLE, SEARCH_OFF
from hf_awq_offload.report import GroupReport, LayerReport, MemoryUse, QuantizationReport
from hf_awq_offload.search.clip import STEP, STEPS, clipped_range, search_clip
from hf_awq_offload.search.rounding import feedback_order, round_weight
from hf_awq_offload.search.statistics import InputStatistics

CPU = torch.device("cpu")


def report_of(model, **changes) -> QuantizationReport:
    return quantize_model(model, token_recipe(**changes)).hf_quantizer.report


def test_a_layer_comes_back_from_json():
    group = GroupReport(("q_proj", "k_proj"), "norm", 0.35, 0.4, 0.1, None, 0.3, 128, 2, (3, 1, 0, 0, 0, 0, 0, 0, 0, 1))
    layer = LayerReport("model.layers.0", (group,), 1.5, {"experts.3": 7}, {"search": 1.0}, MemoryUse(5, 9, 0, 0))
    assert LayerReport.from_dict(json.loads(json.dumps(asdict(layer)))) == layer


def test_a_layer_in_the_journal_of_an_earlier_release_comes_back():
    group = {"consumers": ["o_proj"], "producer": None, "alpha": None, "loss_nearest": 0.4, "loss": 0.1}
    layer = LayerReport.from_dict(
        {"name": "model.layers.0", "groups": [group], "seconds": 1.0, "starved_experts": {}}  # as 0.1.0 wrote it
    )
    assert layer.groups == (GroupReport(("o_proj",), None, None, 0.4, 0.1),)
    assert layer.groups[0].loss_scaled is None
    assert layer.memory is None


def test_every_step_of_a_group_is_told():
    report = report_of(tiny_llama())
    for layer in report.layers:
        names = [name for group in layer.groups for name in group.consumers]
        assert len(names) == 7
        for group in layer.groups:
            assert group.loss_scaled is not None
            assert 0 < group.loss < group.loss_scaled <= group.loss_nearest
            assert (group.alpha is None) == (group.unscaled == NO_BETTER)
            assert 0 <= group.rows_nearest < group.rows
        qkv, o, gate_up, down = layer.groups
        assert qkv.rows == 64 + 2 * 32
        # Groups of 32 weights: of v only, since q and k are not clipped; then of o, of gate and up, and of down.
        assert [sum(g.clip_counts) for g in (qkv, o, gate_up, down)] == [32 * 2, 64 * 2, 2 * 96 * 2, 64 * 3]
        assert all(len(group.clip_counts) == STEPS for group in layer.groups)
        assert 0 < down.clip_counts[0] < sum(down.clip_counts)


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral, tiny_gpt_oss])
def test_where_nothing_is_searched_all_losses_are_that_of_the_nearest(build):
    """Holds for experts too, each of which sees its own tokens."""
    report = report_of(build(), n_grid=0, clip=False, rounding="error_feedback")
    nearest = report_of(build(), n_grid=0, clip=True, rounding="nearest")
    for ours, theirs in zip(report.layers, nearest.layers, strict=True):
        for group, other in zip(ours.groups, theirs.groups, strict=True):
            assert group.unscaled == other.unscaled == SEARCH_OFF
            assert group.loss_scaled == pytest.approx(group.loss_nearest, rel=1e-4)
            assert other.loss_nearest == pytest.approx(group.loss_nearest, rel=1e-4)
            assert group.clip_counts == ()
            assert group.loss < group.loss_nearest


def test_losses_are_counted_where_the_weights_are(monkeypatch):
    """Statistics may be in RAM while a layer is on the accelerator."""
    moved, used = [], []
    to, own = InputStatistics.to, layer_quantization._identity_loss

    def moving(self, device):
        moved.append(replace(to(self, device)))
        return moved[-1]

    def watched(context, names, statistics):
        used.append(statistics)
        return own(context, names, statistics)

    monkeypatch.setattr(InputStatistics, "to", moving)
    monkeypatch.setattr(layer_quantization, "_identity_loss", watched)
    report_of(tiny_mixtral())
    assert len(used) == 2 * 3
    assert all(any(each is other for other in moved) for each in used)


def test_why_a_group_has_no_scale(monkeypatch):
    without_data = report_of(tiny_llama(), n_grid=0, clip=False, rounding="nearest")
    assert {group.unscaled for layer in without_data.layers for group in layer.groups} == {NO_DATA}
    assert all(group.rows_nearest == group.rows > 0 for layer in without_data.layers for group in layer.groups)
    experts = [group for group in report_of(tiny_gpt_oss()).layers[0].groups if "down_proj" in group.consumers[0]]
    assert {group.unscaled for group in experts} == {NO_PRODUCER}
    monkeypatch.setattr(
        "hf_awq_offload.pipeline.scaling.storable_scales",
        lambda layer, fold, row_scales: (row_scales, torch.zeros(len(row_scales), dtype=torch.bool)),
    )
    assert {group.unscaled for group in report_of(tiny_llama()).layers[0].groups} == {NOT_STORABLE}


def test_time_and_memory_of_every_layer_are_told():
    for layer in report_of(tiny_gemma2()).layers:
        assert list(layer.phase_seconds) == ["onload", "structure", "forward", "search"]
        assert 0 < sum(layer.phase_seconds.values()) <= layer.seconds
        assert layer.memory is not None
        assert 0 <= layer.memory.ram <= layer.memory.ram_peak
        assert layer.memory.accelerator_peak == 0


def without_time_and_memory(report: QuantizationReport) -> list[LayerReport]:
    return [replace(layer, seconds=0.0, phase_seconds={}, memory=None) for layer in report.layers]


def test_a_run_that_went_on_reports_as_one_that_was_not_stopped(tmp_path: Path, monkeypatch):
    source = save_model(tiny_mixtral(num_hidden_layers=3), tmp_path / "mixtral")
    recipe = token_recipe(min_expert_tokens=100)
    undisturbed = quantize(source, tmp_path / "reference", recipe)
    commit = Journal.commit

    def stopping(self, index, *args, **kwargs):
        result = commit(self, index, *args, **kwargs)
        if index == 1:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    resumed = quantize(source, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    assert without_time_and_memory(resumed) == without_time_and_memory(undisturbed)
    assert all(layer.starved_experts for layer in resumed.layers)
    assert all(layer.memory is not None and layer.phase_seconds for layer in resumed.layers)


def test_what_a_group_kept_of_its_range_is_what_the_search_found():
    generator = torch.Generator().manual_seed(0)
    grid = Grid(4, 32, zero_point=True)
    weight = torch.randn(40, 96, generator=generator) * torch.rand(40, 1, generator=generator)
    weight[3, :32] = 0
    x = torch.randn(300, 96, generator=generator)
    gram = x.t() @ x / 300
    clipped, full = search_clip(weight, gram, grid), group_range(weight, grid)
    rounded = round_weight(weight, gram, grid, clipped=clipped, order=feedback_order(gram))
    assert rounded.clip_ratio is not None
    steps = (1 - rounded.clip_ratio) / STEP
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    again = clipped_range(full, steps.round())
    for ours, theirs in zip(again, clipped, strict=True):
        torch.testing.assert_close(ours[rounded.improved], theirs[rounded.improved])
    assert bool((rounded.clip_ratio[~rounded.improved] == 1).all())
    assert float(rounded.clip_ratio[3, 0]) == 1


OWN_PROCESS = """
import json, torch
from hf_awq_offload.offload.memory_use import MemoryWatch
before = torch.ones(2**23)  # 32 MiB that are not the run's
watch = MemoryWatch(torch.device("cpu"))
start = watch.now()
block = torch.ones(2**24)  # 64 MiB
during = watch.now()
del block
after = watch.now()
print(json.dumps([start.ram, during.ram, after.ram, after.ram_peak]))
"""


def test_memory_is_counted_from_the_beginning_of_the_run():
    # In its own process, because garbage of other tests could be freed at any moment.
    result = subprocess.run([sys.executable, "-c", OWN_PROCESS], capture_output=True, text=True, check=True)
    start, during, after, peak = json.loads(result.stdout)
    assert start < 2**22
    assert during == pytest.approx(2**26, rel=0.1)
    assert after < 2**24
    assert peak >= during


def test_memory_of_an_accelerator_is_counted_from_the_beginning_too(monkeypatch):
    allocated, highest = [100], [900]  # the peak is from before the run
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: highest[0])
    watch = MemoryWatch(torch.device("cuda"))
    found = []
    for allocated[0], highest[0] in ((400, 900), (200, 900), (300, 1000), (50, 1000)):
        now = watch.now()
        found.append((now.accelerator, now.accelerator_peak))
    assert found == [(300, 300), (100, 300), (200, 900), (0, 900)]
