"""Collecting statistics on a GPU: half-precision products as they are, few waits, pinned copies of hidden states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import save_model, tiny_llama, tiny_mixtral, token_recipe
from simulated_gpu import observed
from simulated_gpu.layer_counts import PhaseCounts
from torch import Tensor, nn

from hf_awq_offload import quantize, transfers
from hf_awq_offload.calibration import gram_products
from hf_awq_offload.calibration.statistics_collector import StatisticsCollector
from hf_awq_offload.offload.hidden_readback import HiddenReadback
from hf_awq_offload.offload.hidden_states import HiddenWriter
from hf_awq_offload.search.statistics import InputStatistics

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
TOKENS, CHANNELS = 384, 768


def collected(x: Tensor, counted: Tensor | None = None, sums: torch.device | None = None) -> InputStatistics:
    """Returns the statistics of a linear's input `x` (batch, tokens, in), from two batches of it."""
    linear = nn.Linear(x.shape[-1], 8, dtype=x.dtype, device=x.device)
    collector = StatisticsCollector({"fc": linear}, sums or x.device)
    with collector.collecting(), torch.no_grad():
        for _ in range(2):
            collector.set_counted_tokens(counted)
            linear(x)
    return collector.take("fc", "layers.0")


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, TOKENS // 2, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)


ADDERS = {
    "addmm": (gram_products._add_addmm,),
    "mm": (gram_products._add_mm,),
    "neither": (),
}


@pytest.fixture(params=ADDERS)
def adders(request, monkeypatch) -> str:
    """Lets torch have some of the products of half-precision matrices."""
    add = next(iter(ADDERS[request.param]), None)
    monkeypatch.setattr(gram_products, "_ADDERS", {(dtype, GPU): add for dtype in (torch.bfloat16, torch.float16)})
    return str(request.param)


@pytest.mark.parametrize("sums", [GPU, CPU], ids=["sums on the GPU", "sums in RAM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_fp32(adders, dtype, sums):
    x = inputs(dtype)
    counted = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.7
    found = collected(x.to(GPU), counted, sums)
    rows = x[counted].double()
    assert found.tokens == 2 * len(rows)
    assert found.gram.dtype == found.mean_abs.dtype == torch.float32
    torch.testing.assert_close(found.gram.double().cpu(), rows.t() @ rows / len(rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_abs.double().cpu(), rows.abs().mean(dim=0), rtol=1e-5, atol=1e-6)


def test_torchs_products_are_used_where_they_work():
    assert gram_products.adder_for(torch.bfloat16, GPU) is gram_products._add_addmm
    assert gram_products.adder_for(torch.float32, GPU) is None
    assert gram_products.adder_for(torch.bfloat16, CPU) is None


def test_an_adder_that_rounds_its_sums_is_not_used():
    def rounding(block: Tensor, left: Tensor, right: Tensor) -> None:
        block.add_(left @ right)

    def lacking(block: Tensor, left: Tensor, right: Tensor) -> None:
        torch.mm(left, right, no_such_argument=True)

    for add in (rounding, lacking):
        assert not gram_products._works(add, torch.bfloat16, GPU)


def test_running_out_of_memory_while_an_adder_is_tried_says_nothing_about_it():
    def full(block: Tensor, left: Tensor, right: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gram_products._works(full, torch.bfloat16, GPU)


def test_no_copy_in_fp32_is_made_of_the_inputs():
    x = inputs(torch.bfloat16).to(GPU)
    linear = nn.Linear(CHANNELS, 8, dtype=x.dtype, device=GPU)
    collector = StatisticsCollector({"fc": linear}, GPU)
    with collector.collecting(), torch.no_grad():
        linear(x)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        linear(x)
    assert torch.cuda.max_memory_allocated() - held < x.numel() * 4 / 4


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral], ids=lambda build: build.__name__)
def test_the_host_waits_for_a_batchs_outputs_and_once_for_its_routing(build, tmp_path):
    source = save_model(build(num_hidden_layers=2).to(torch.bfloat16), tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 60, (16,), generator=generator).tolist(), "loss_mask": [0] * 4 + [1] * 12}
        for _ in range(8)
    ]
    gram_products.adder_for(torch.bfloat16, GPU)  # tries it, and waits for that
    counts = PhaseCounts()
    with counts.of_runs():
        quantize(
            source, tmp_path / "out",
            token_recipe(dataset=data, n_samples=8, max_seq_len=16, batch_tokens=32, execution_device="cuda:0"),
        )  # fmt: skip
    layers, batches = 2, 4
    forward = counts.phases["forward"]
    per_batch = 1 if build is tiny_llama else 2
    assert forward.counts["synchronizations"] <= layers * batches * per_batch
    assert forward.counts["pageable_host_to_device_bytes"] == 0


@pytest.fixture(params=["pinned", "nothing can be pinned"])
def pinning(request, monkeypatch) -> bool:
    monkeypatch.setattr(transfers, "_can_pin", True)
    if request.param != "pinned":
        empty_like = torch.empty_like

        def refusing(*args: object, pin_memory: bool = False, **kwargs: object) -> Tensor:
            if pin_memory:
                raise RuntimeError("CUDA error: out of memory")
            return empty_like(*args, **kwargs)

        monkeypatch.setattr(torch, "empty_like", refusing)
    return bool(request.param == "pinned")


@pytest.mark.parametrize("to_file", [False, True], ids=["in RAM", "in a file"])
def test_outputs_are_written_in_order_with_their_bits(pinning, to_file, tmp_path):
    writer = HiddenWriter(tmp_path / "hidden.bin" if to_file else None)
    readback = HiddenReadback(writer)
    given = [torch.randn(2, 3 + index, 4, generator=torch.Generator().manual_seed(index)) for index in range(5)]
    for batch in given:
        output = batch.to(GPU)
        readback.append(output, torch.bfloat16)
        output.zero_()  # the layer's next run takes this memory
    readback.finish()
    states = writer.finish()
    assert all(torch.equal(found, batch.bfloat16()) for found, batch in zip(states.batches, given, strict=True))
    assert not any(batch.is_pinned() for batch in states.batches)


def test_what_is_sent_arrives_with_its_bits(pinning):
    column = torch.randn(6, 4)[:, :1].expand(6, 3)
    for tensor in (torch.randn(5, 3), torch.arange(4), torch.randn(4, 6).t(), column, torch.tensor(True)):
        observed.reset_counters()
        found = transfers.sent(tensor, GPU, torch.float16 if tensor.is_floating_point() else None)
        assert bool(observed.counters()["synchronizations"]) != pinning
        assert torch.equal(found.cpu(), tensor.half() if tensor.is_floating_point() else tensor)


def test_memory_that_can_not_be_pinned_is_asked_for_once(monkeypatch):
    asked: list[int] = []

    def refusing(*args: object, **kwargs: object) -> Callable[[], None]:
        asked.append(1)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(transfers, "_can_pin", True)
    monkeypatch.setattr(torch, "empty_like", refusing)
    assert [transfers.pinned_like(torch.ones(2)) for _ in range(3)] == [None] * 3
    assert len(asked) == 1
