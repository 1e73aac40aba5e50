"""`plan` predicts what a run will take, and a run that can't fit is refused before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_gpt_oss, tiny_llama, token_batch, token_recipe
from transformers import PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, MemoryLimitError, Plan, plan, quantize
from hf_awq_offload.checkpoint import stored_tensor
from hf_awq_offload.integrations import assembly
from hf_awq_offload.offload import journal
from hf_awq_offload.offload.memory_limit import release_freed
from hf_awq_offload.offload.memory_use import MemoryMeter
from hf_awq_offload.pipeline.budget import PROCESS_BYTES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=6), tmp_path_factory.mktemp("llama"))


def test_a_plan_says_what_a_run_takes(llama):
    planned = plan(llama, token_recipe())
    assert (planned.device, planned.layers, planned.tokens, planned.batch_tokens) == ("cpu", 6, 120, 40)
    assert planned.accelerator_peak_bytes == 0
    assert planned.ram_peak_bytes > 0
    assert planned.seconds is not None
    assert planned.seconds > 0
    assert "6 layers on cpu, 120 tokens" in str(planned)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_that_the_probe_quantizes_whole(layers, tmp_path):
    planned = plan(save_model(tiny_llama(num_hidden_layers=layers), tmp_path), token_recipe())
    assert planned.layers == layers
    assert planned.seconds is not None
    assert planned.seconds > 0


def test_without_a_probe_no_weight_is_read(llama, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(stored_tensor, "read_tensor", fail)
    planned = plan(llama, token_recipe(), probe=False)
    assert planned.seconds is None
    layer_bytes = sum(p.numel() * 4 for p in tiny_llama().model.layers[0].parameters())
    hidden_bytes = 120 * 64 * 4
    assert 2 * layer_bytes + hidden_bytes < planned.ram_peak_bytes - PROCESS_BYTES < 20 * layer_bytes


SHAPES: dict[str, tuple[Callable[[], PreTrainedModel], dict]] = {
    "more hidden states than weights": (lambda: tiny_llama(num_hidden_layers=4, hidden_size=256), {}),
    "more weights": (lambda: tiny_llama(num_hidden_layers=5, hidden_size=256, vocab_size=4096), {"n_samples": 4}),
    "experts": (lambda: tiny_gpt_oss(hidden_size=256, intermediate_size=256), {"n_samples": 4}),
}


@pytest.mark.parametrize(("build", "changes"), SHAPES.values(), ids=SHAPES)
def test_as_much_lies_on_the_disk_as_planned(build, changes, tmp_path, monkeypatch):
    source = save_model(build(), tmp_path / "source")
    recipe = token_recipe(dataset=token_batch(64, 20).tolist(), **{"n_samples": 64} | changes)
    planned = plan(source, recipe, probe=False)
    most = []

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            most.append(sum(path.stat().st_size for path in (tmp_path / "result").rglob("*") if path.is_file()))
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(journal.Journal, "_keep")  # the hidden states of three layers exist now
    watch(assembly, "write_shards")  # and here the checkpoint beside the journal
    quantize(source, tmp_path / "result" / "out", recipe)
    assert max(most) == pytest.approx(planned.disk_bytes, rel=0.15)


def test_the_time_grows_with_the_tokens_and_the_layers(llama, monkeypatch):
    few, many = (
        plan(llama, token_recipe(n_samples=4)),
        plan(llama, token_recipe(dataset=[[5] * 20] * 400, n_samples=400)),
    )
    assert few.seconds is not None
    assert many.seconds is not None
    assert many.seconds > 2 * few.seconds


@pytest.mark.parametrize("call", [plan, lambda src, recipe, **kw: quantize(src, src.parent / "never", recipe, **kw)])
def test_what_can_not_fit_is_refused_before_a_weight_is_read(call, llama, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(stored_tensor, "read_tensor", fail)
    with pytest.raises(MemoryLimitError, match=r"GiB of RAM.*max_memory\['cpu'\].*Set n_samples.*raise max_memory"):
        call(llama, token_recipe(), max_memory={"cpu": "100KB"})
    assert not (llama.parent / "never").exists()


def test_planning_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(llama.iterdir())
    plan(llama, token_recipe())
    assert sorted(llama.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


def test_a_plan_can_be_read():
    planned = Plan("cuda:0", 80, 65536, 4096, 8 << 30, 4 << 30, 40 << 30, 5400.0)
    assert str(planned) == (
        "80 layers on cuda:0, 65536 tokens in micro-batches of 4096, accelerator 8.00 GiB, RAM 4.00 GiB, "
        "disk 40.00 GiB, 90.0 minutes"
    )


def test_the_limit_of_a_device_goes_by_its_index():
    limits = AwqOffloadConfig(max_memory={"cpu": "2GiB", "cuda:0": 8})
    assert limits.memory_limit_bytes(CPU) == 2 << 30
    assert limits.memory_limit_bytes(torch.device("cuda")) == 8
    assert limits.memory_limit_bytes(torch.device("cuda", 1)) is None
    assert AwqOffloadConfig().memory_limit_bytes(CPU) is None


def test_a_peak_is_measured_from_its_beginning():
    meter = MemoryMeter(CPU)
    if meter.baseline_bytes is None:
        pytest.skip("needs /proc/self/clear_refs of Linux")
    block = torch.ones(2**24)  # 64 MiB
    del block
    release_freed()
    ram_bytes, accelerator_bytes = meter.peak_bytes()
    assert ram_bytes is not None
    assert 0.9 * 2**26 < ram_bytes < 1.5 * 2**26
    assert accelerator_bytes == 0
