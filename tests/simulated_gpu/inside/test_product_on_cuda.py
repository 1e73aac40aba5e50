"""The product on a GPU: memory, disk and CPU give the same; devices, streams and limits are kept to.

Runs on a real one as well (tests/gpu/card_tests.py), except for what is marked `only_simulated`.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import simulated_gpu
import torch
from killing import digests
from models import (
    save_model,
    tiny_ernie_moe,
    tiny_gemma2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen3,
    token_recipe,
)
from simulated_gpu import observed
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import quantize, quantize_model, streamed
from hf_awq_offload.offload.devices import default_execution_device
from hf_awq_offload.offload.memory_limit import at_most
from hf_awq_offload.report import QuantizationReport

BUILDERS = [tiny_llama, tiny_qwen3, tiny_gemma2, tiny_mixtral, tiny_ernie_moe, tiny_gpt_oss]
LAST = torch.cuda.device_count() - 1
"""The device to choose: cuda:1 where there are two, so that what runs on the current device is noticed."""
GPU = f"cuda:{LAST}"
IDS = torch.arange(3, 11)[None]
MIB = 2**20
only_simulated = pytest.mark.skipif(
    not simulated_gpu.is_active(),
    reason="reads what only the simulated GPU tells, or has a limit without CUDA's own use",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=3).to(torch.bfloat16), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def others_unused():
    """Asserts that a test allocates nothing on devices that it does not choose."""
    gc.collect()
    before = [torch.cuda.memory_stats(index)["allocation.all.allocated"] for index in range(LAST)]
    yield
    after = [torch.cuda.memory_stats(index)["allocation.all.allocated"] for index in range(LAST)]
    assert after == before, "memory was allocated on a device that was not chosen"
    assert torch.cuda.current_device() == 0


def loaded(source: Path, device_map: object = None, **recipe: object) -> PreTrainedModel:
    config = token_recipe(**{"execution_device": GPU} | recipe)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto", device_map=device_map)


def choices(report: QuantizationReport) -> list[tuple[tuple[str, ...], str | None, float | None]]:
    """Returns which linears share a scale, what absorbs it, and how strong it is."""
    return [(tuple(g.consumers), g.producer, g.alpha) for layer in report.layers for g in layer.groups]


def test_the_accelerator_is_chosen():
    assert default_execution_device() == torch.device("cuda", 0)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_from_memory_from_the_disk_and_on_the_cpu_it_is_the_same(build, tmp_path, others_unused):
    """In full precision, because a CPU may compute in another dtype than a GPU where weights are in half precision."""
    source = save_model(build(), tmp_path / "source")
    reports = {
        device: quantize(source, tmp_path / device, token_recipe(execution_device=device)) for device in (GPU, "cpu")
    }
    loaded(source).save_pretrained(tmp_path / "memory")
    assert digests(tmp_path / "memory") == digests(tmp_path / GPU)
    assert choices(reports[GPU]) == choices(reports["cpu"])
    losses = [
        torch.tensor([g.loss for layer in report.layers for g in layer.groups], dtype=torch.float64)
        for report in reports.values()
    ]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rounding", ["error_feedback", "nearest"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral], ids=lambda build: build.__name__)
def test_in_half_precision_too_the_disk_gives_what_memory_gives(build, rounding, tmp_path, others_unused):
    source = save_model(build().to(torch.bfloat16), tmp_path / "source")
    quantize(source, tmp_path / "disk", token_recipe(execution_device=GPU, rounding=rounding))
    loaded(source, rounding=rounding).save_pretrained(tmp_path / "memory")
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk")


@pytest.mark.parametrize("changes", [{"prefetch": False}, {"offload": "disk"}], ids=["no prefetch", "disk"])
def test_where_weights_wait_changes_no_bit(changes, llama, tmp_path, others_unused):
    loaded(llama).save_pretrained(tmp_path / "plain")
    loaded(llama, **changes).save_pretrained(tmp_path / "changed")
    assert digests(tmp_path / "plain") == digests(tmp_path / "changed")


def test_a_model_in_memory_stays_where_it_is(llama, tmp_path, others_unused):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").to(GPU)
    quantize_model(model, token_recipe(execution_device=GPU))
    assert {parameter.device for parameter in model.parameters()} == {torch.device(GPU)}
    assert torch.isfinite(model(IDS.to(GPU)).logits).all()


@pytest.mark.parametrize("backend", ["auto", "triton", "tinygemm", "torch"])
def test_a_quantized_model_generates_on_its_device(backend, tmp_path, others_unused):
    shape = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # of which tinygemm takes all linears
    source = save_model(tiny_llama(**shape).to(torch.bfloat16), tmp_path / "source")
    model = loaded(source, device_map=GPU, backend=backend)
    assert {parameter.device for parameter in model.parameters()} == {torch.device(GPU)}
    outputs = model.generate(IDS.to(GPU), max_new_tokens=4, do_sample=False, pad_token_id=0)
    reference = loaded(source).generate(IDS, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert outputs.shape == (1, 12)
    assert torch.equal(outputs[:, :9].cpu(), reference)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_adapters_train_on_its_device(llama, others_unused):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        loaded(llama, device_map=GPU), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    model(IDS.to(GPU), labels=IDS.to(GPU)).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(
        gradient is not None and gradient.device == torch.device(GPU) and gradient.any() for gradient in gradients
    )
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items() if "qweight" in name}
    model.merge_adapter()
    model.unmerge_adapter()
    assert packed
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in packed.items())


@only_simulated
def test_running_out_of_memory_takes_smaller_micro_batches(tmp_path, others_unused, monkeypatch):
    monkeypatch.setattr(streamed, "require_fit", lambda *args: None)  # a plan that is wrong
    model = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2).to(torch.bfloat16)
    source = save_model(model, tmp_path / "source")
    ids = torch.randint(3, 64, (128, 128), generator=torch.Generator().manual_seed(0)).tolist()
    recipe = {"dataset": ids, "n_samples": 128, "max_seq_len": 128, "n_grid": 1, "clip": False, "rounding": "nearest"}
    limit = {"max_memory": {GPU: 36 * MIB}, "batch_tokens": 16384}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(LAST)
    ooms = torch.cuda.memory_stats(LAST)["num_ooms"]
    quantize(source, tmp_path / "out", token_recipe(execution_device=GPU, **recipe, **limit))
    assert torch.cuda.memory_stats(LAST)["num_ooms"] > ooms, "the limit was never reached"
    assert torch.cuda.max_memory_reserved(LAST) <= 36 * MIB
    torch.empty(64 * MIB, device=GPU, dtype=torch.uint8)  # the limit is gone


@pytest.mark.parametrize("own", [0.5, 1e-5])
def test_a_limit_that_the_caller_has_set_is_kept(own):
    device = torch.device(GPU)
    tenth = torch.cuda.get_device_properties(device).total_memory // 10
    torch.cuda.set_per_process_memory_fraction(own, device)
    try:
        with at_most({device: tenth}):
            assert torch.cuda.get_per_process_memory_fraction(device) == pytest.approx(min(own, 0.1))
        assert torch.cuda.get_per_process_memory_fraction(device) == own
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@only_simulated
def test_layers_are_prefetched_from_pinned_memory(llama, tmp_path, others_unused):
    observed.reset_counters()
    quantize(llama, tmp_path / "out", token_recipe(execution_device=GPU))
    counters = observed.counters()
    pinned = counters["host_to_device_bytes"] - counters["pageable_host_to_device_bytes"]
    layers_bytes = 2 * 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    assert pinned >= layers_bytes
    assert counters["pinned_peak_bytes"] > 0


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this run has one device; the run with two has it")
SPREAD = {
    "model.embed_tokens": 0,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.norm": 1,
    "model.rotary_emb": 1,
    "lm_head": 1,
}


@needs_two
@pytest.mark.parametrize("third", [1, "cpu"])
def test_a_model_on_several_devices_is_quantized_and_runs(third, llama):
    device_map = SPREAD | {"model.layers.2": third}
    model = loaded(llama, device_map=device_map)
    assert torch.isfinite(model(IDS.to("cuda:0")).logits).all()
    devices = {str(p.device) for p in model.model.layers[1].parameters()}
    assert devices == {"cuda:1"}


@needs_two
@pytest.mark.parametrize("third", [1, "cpu"])
def test_a_dispatched_model_in_memory_is_quantized_and_runs(third, llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto", device_map=SPREAD | {"model.layers.2": third})
    quantize_model(model, token_recipe())
    assert torch.isfinite(model(IDS.to("cuda:0")).logits).all()
    assert {str(p.device) for p in model.model.layers[1].parameters()} == {"cuda:1"}


def test_triton_is_tried_once_on_the_device_that_is_asked_about():
    from hf_awq_offload.triton_trial import trial

    trial._tried.clear()
    observed.reset_counters()
    for _ in range(2):
        assert trial.triton_refusal(torch.device(GPU)) is None
    assert observed.launches_by_operation()["trial_kernel"] == 1
    assert list(trial._tried) == [torch.device(GPU)]
