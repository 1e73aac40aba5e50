"""Memory limits are kept: the micro-batch and the statistics' device follow from the memory that is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_llama, tiny_mixtral, token_batch, token_recipe
from torch import Tensor, nn

from hf_awq_offload import AwqOffloadConfig, plan, quantize
from hf_awq_offload.calibration import statistics_collector
from hf_awq_offload.calibration.dataset import CalibrationSet
from hf_awq_offload.calibration.statistics_collector import StatisticsCollector
from hf_awq_offload.model.expert_interface import unfused
from hf_awq_offload.offload.devices import CPU
from hf_awq_offload.pipeline import budget
from hf_awq_offload.pipeline.budget import (
    ACCELERATOR_BATCH_TOKENS,
    CPU_BATCH_TOKENS,
    PROCESS_BYTES,
    SMALL_CHUNK,
    budget_for,
)
from hf_awq_offload.pipeline.layer_sizes import LayerSizes, SearchedInput
from hf_awq_offload.pipeline.memory_pressure import LEAST_ELEMENTS
from hf_awq_offload.search.chunks import ACCELERATOR_ELEMENTS

GPU = torch.device("cuda", 0)


class FixedSearch(SearchedInput):
    """A search that takes 500 bytes in whatever chunks."""

    def search_bytes_on_cpu(self, chunk_elements: int) -> int:
        return 500

    ranking_bytes = rounding_bytes = search_bytes_on_cpu


SIZES = LayerSizes(
    weights=100, computed_copy=0, statistics=300, largest_gram=120, probing=0, activation_bytes_per_token=4,
    inputs=(FixedSearch(0, 0, 0, 1),),
)  # fmt: skip
USUAL = {"prefetch": True, "longest_tokens": 20, "total_tokens": 10_000}


def test_sizes_are_those_of_the_layer():
    sizes = LayerSizes.of(tiny_llama().model.layers, CPU)
    hidden, intermediate, key_value = 64, 96, 32
    widths = [(hidden, hidden), (hidden, key_value), (hidden, intermediate), (intermediate, hidden)]
    assert sizes.weights == sum(p.numel() * 4 for p in tiny_llama().model.layers[0].parameters())
    assert sizes.computed_copy == 0
    assert sizes.statistics == sum(4 * width**2 for width, _ in widths)
    assert sizes.largest_gram == 4 * intermediate**2
    both = [(hidden, key_value), (hidden, intermediate)]  # k beside v, gate beside up
    assert sizes.activation_bytes_per_token == 4 * sum(map(sum, [*widths, *both])) + 4 * (hidden + hidden)


def test_every_expert_has_statistics_of_its_own():
    layer = tiny_mixtral().model.layers[0]
    fused = LayerSizes.of([layer], CPU).statistics
    experts = next(name for name, _ in layer.named_modules() if name.endswith("experts"))
    layer.set_submodule(experts, unfused(layer.get_submodule(experts), None))
    assert LayerSizes.of([layer], CPU).statistics == fused
    assert fused >= 3 * 4 * (64**2 + 96**2)


def test_activations_are_those_of_one_expert_at_a_time():
    """Of a layer whose experts are taken apart and of one whose experts are still fused."""
    layer = tiny_mixtral().model.layers[0]
    hidden, intermediate, key_value = 64, 96, 32
    attention = 2 * (hidden + hidden) + 2 * (hidden + key_value)
    expected = 4 * (attention + 3 * (hidden + intermediate))
    assert LayerSizes.of([layer], CPU).activation_bytes_per_token == expected
    experts = next(name for name, _ in layer.named_modules() if name.endswith("experts"))
    layer.set_submodule(experts, unfused(layer.get_submodule(experts), None))
    assert LayerSizes.of([layer], CPU).activation_bytes_per_token == expected


def test_pinned_copies_are_counted_as_torch_rounds_them():
    layer = nn.ModuleList([nn.Linear(48, 64, bias=False), nn.Linear(64, 64, bias=False)])
    assert LayerSizes.of([layer], CPU).pinned == 2 * 4 * 64 * 64


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("limit_bytes", [1_080, 1_500, 5_000, 10_000])
def test_the_micro_batch_takes_what_the_rest_leaves(device, limit_bytes):
    budget = budget_for(SIZES, device, **USUAL, limit_bytes=limit_bytes)
    assert budget.statistics_device == device
    assert budget.peak_bytes <= limit_bytes
    assert budget.batch_tokens == min(CPU_BATCH_TOKENS, (limit_bytes - 200 - 300) // 4)
    assert budget.prefetch
    assert budget.peak_bytes == 200 + 300 + max(500, 4 * budget.batch_tokens)


def test_a_micro_batch_that_is_asked_for_is_taken_and_counted():
    budget = budget_for(SIZES, GPU, **USUAL, batch_tokens=1_000, limit_bytes=2_000)
    assert (budget.batch_tokens, budget.peak_bytes) == (1_000, 200 + 300 + 4 * 1_000)


@pytest.mark.parametrize("total", ["limit_bytes", "total_bytes"])
def test_first_the_next_layer_is_given_up_then_statistics_go_to_RAM(total):
    limits = (1_000, 999, 900, 899, 720)
    found = [budget_for(SIZES, GPU, **USUAL, **{total: limit}) for limit in limits]
    assert [budget.prefetch for budget in found] == [True, False, False, False, False]
    assert [budget.statistics_device for budget in found] == [GPU, GPU, GPU, CPU, CPU]
    assert all(budget_for(SIZES, CPU, **USUAL, **{total: limit}).statistics_device == CPU for limit in limits)
    if total == "limit_bytes":
        assert all(budget.peak_bytes <= limit for budget, limit in zip(found, limits, strict=True))
    long = budget_for(SIZES, GPU, prefetch=True, longest_tokens=200, total_tokens=10_000, **{total: 1_100})
    assert long.statistics_device == CPU, "a single sequence beside the sums is too much"


def test_chunks_shrink_before_anything_else_is_given_up_and_to_the_least_after_it():
    searched = SearchedInput(64, 2**26, 2**26, 64)
    sizes = LayerSizes(0, 0, 300, 120, 0, 4, (searched,), "cuda")
    peaks = {}
    for chunk in (ACCELERATOR_ELEMENTS, SMALL_CHUNK, LEAST_ELEMENTS):
        peaks[chunk] = 300 + max(searched.ranking_bytes(chunk), searched.rounding_bytes(chunk))
        budget = budget_for(sizes, GPU, **USUAL, limit_bytes=peaks[chunk])
        assert (budget.chunk_elements, budget.peak_bytes) == (chunk, peaks[chunk])
        assert budget.statistics_device == GPU
    assert budget_for(sizes, GPU, **USUAL, limit_bytes=peaks[SMALL_CHUNK]).prefetch
    assert not budget_for(sizes, GPU, **USUAL, limit_bytes=peaks[LEAST_ELEMENTS]).prefetch
    assert budget_for(sizes, CPU, **USUAL).chunk_elements is None


def test_the_place_of_the_statistics_does_not_depend_on_what_is_free():
    found = [budget_for(SIZES, GPU, **USUAL, total_bytes=2_000, free_bytes=free) for free in (10, 1_900)]
    assert {(budget.statistics_device, budget.chunk_elements) for budget in found} == {(GPU, ACCELERATOR_ELEMENTS)}


def test_without_a_limit_a_share_of_what_is_free_is_taken():
    assert budget_for(SIZES, GPU, **USUAL, total_bytes=9_000, free_bytes=8_000).batch_tokens == 8_000 // 4 // 4
    large = budget_for(SIZES, GPU, **USUAL, total_bytes=80 * 2**30, free_bytes=80 * 2**30)
    assert large.batch_tokens == ACCELERATOR_BATCH_TOKENS, "a larger card gives no larger micro-batches"
    assert budget_for(SIZES, CPU, **USUAL).batch_tokens == CPU_BATCH_TOKENS


def test_what_the_allocator_takes_beside_tensors_keeps_to_the_limit_too(monkeypatch):
    with torch.device("meta"):
        model = tiny_llama(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=8)
    limits = [1]
    monkeypatch.setattr(AwqOffloadConfig, "memory_limit_bytes", lambda recipe, device: limits[-1])
    monkeypatch.setattr(budget, "accelerator_bytes", lambda device: (80 * 2**30, 80 * 2**30))
    data = CalibrationSet([torch.zeros(512, dtype=torch.int64)] * 64, [None] * 64, "data")

    def peak_bytes(limit_bytes: int) -> int:
        limits.append(limit_bytes)
        return budget.budget_of(model, AwqOffloadConfig(), GPU, data).peak_bytes

    least, most = peak_bytes(1), peak_bytes(2**40)
    assert most > 1.2 * least
    for limit_bytes in range(least, most, 10 << 20):
        assert peak_bytes(limit_bytes) <= limit_bytes


def test_on_a_cpu_the_casts_that_probing_keeps_are_counted():
    layer = tiny_llama().bfloat16().model.layers[0]
    casts = 4 * sum(parameter.numel() for parameter in layer.parameters())
    assert LayerSizes.of([layer], CPU).probing == LayerSizes.of([layer], GPU).probing + casts


def test_sums_that_live_elsewhere_are_the_same(monkeypatch):
    rows = torch.randn(3, 50, 600, generator=torch.Generator().manual_seed(0))
    found = []
    for together in (True, False):
        monkeypatch.setattr(statistics_collector, "_are_together", lambda *tensors, together=together: together)
        linear = nn.Linear(600, 4)
        collector = StatisticsCollector({"a": linear}, CPU)
        with collector.collecting():
            for batch in rows:
                linear(batch)
        found.append(collector.take("a", "layer"))
    torch.testing.assert_close(found[1].gram, found[0].gram)
    assert torch.equal(found[1].mean_abs, found[0].mean_abs)


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama and 2560 tokens in sequences of 20, so that activations outweigh the weights."""
    return save_model(tiny_llama(num_hidden_layers=2, intermediate_size=512), tmp_path_factory.mktemp("llama"))


RECIPE = {"dataset": token_batch(128, 20).tolist(), "n_samples": 128, "batch_tokens": None}


@pytest.mark.parametrize("room_bytes", [500_000, 2_000_000, 10**9])
def test_a_run_on_the_cpu_takes_no_more_than_it_is_allowed(room_bytes, llama, tmp_path, monkeypatch):
    """Counts the bytes of this layer and the next, of the sums, and of all linears' inputs and outputs."""
    layer = tiny_llama(intermediate_size=512).model.layers[0]
    layer_bytes = sum(p.numel() * 4 for p in layer.parameters())
    sizes = LayerSizes.of([layer], CPU)
    hidden_bytes = 2560 * 64 * 4
    limit = PROCESS_BYTES + hidden_bytes + 2 * layer_bytes + sizes.statistics + sizes.search_bytes() + room_bytes
    recipe = token_recipe(**RECIPE, max_memory={"cpu": limit})
    batch_tokens = plan(llama, recipe, probe=False).batch_tokens
    tokens, activation_bytes = [], []
    forward = nn.Linear.forward

    def watched(self: nn.Linear, x: Tensor) -> Tensor:
        output = forward(self, x)
        if x.ndim == 3 and x.shape[0] * x.shape[1] > 32 and self.in_features == 512:  # down_proj, of data
            tokens.append(x.shape[0] * x.shape[1])
            activation_bytes.append(tokens[-1] * sizes.activation_bytes_per_token)
        return output

    monkeypatch.setattr(nn.Linear, "forward", watched)
    quantize(llama, tmp_path / "out", recipe)
    assert max(tokens) == min(batch_tokens // 20 * 20, 2560)
    assert PROCESS_BYTES + hidden_bytes + 2 * layer_bytes + sizes.statistics + max(activation_bytes) <= limit
    assert (max(tokens) == 2560) == (room_bytes == 10**9)


LIMITED = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from models import token_batch, token_recipe
from transformers.utils import logging
logging.disable_progress_bar()
from hf_awq_offload import quantize, streamed
from hf_awq_offload.offload.memory_use import MemoryMeter
streamed.require_fit = lambda *args: None  # a plan that is wrong
recipe = token_recipe(dataset=token_batch(400, 100).tolist(), n_samples=400, max_seq_len=100, batch_tokens=40_000)
meter = MemoryMeter(torch.device("cpu"))
quantize({source!r}, {target!r}, recipe, max_memory={max_memory!r})
print("PEAK", meter.peak_bytes()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_the_process_does_not_take_more_ram_than_it_is_allowed(llama, tmp_path):
    """A plan that was wrong: allocating fails at the limit, and that halves the micro-batch."""
    here = Path(__file__).resolve().parents[1]
    peaks = {}
    for name, max_memory in {"limited": {"cpu": 128 << 20}, "free": None}.items():
        code = LIMITED.format(
            paths=[str(here), str(here.parent)], source=str(llama), target=str(tmp_path / name), max_memory=max_memory
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[name] = int(done.stdout.split("PEAK")[1])
        assert ("Continuing with micro-batches of" in done.stderr) == (name == "limited"), done.stderr[-2000:]
    mapped_bytes = 3 * 40_000 * 64 * 4  # hidden states, in files
    most_bytes = (128 << 20) + PROCESS_BYTES + mapped_bytes  # the limit counts from where modules are imported
    assert peaks["limited"] < most_bytes < 0.7 * peaks["free"]
