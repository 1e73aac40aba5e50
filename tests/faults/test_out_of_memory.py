"""Memory that runs out, in whatever phase, is answered by smaller micro-batches or an error that names the phase.

The errors are those of torch's allocator, the CUDA driver and others, raised on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killing import digests
from models import save_model, tiny_llama, token_recipe
from torch import nn

from hf_awq_offload import AwqOffloadConfig, MemoryLimitError, quantize, quantize_model
from hf_awq_offload.calibration import opened_inputs
from hf_awq_offload.calibration.chain_inputs import ChainInputs
from hf_awq_offload.machine_errors import is_out_of_memory
from hf_awq_offload.model.linears import is_linear
from hf_awq_offload.offload.onloader import Onloader
from hf_awq_offload.offload.stored_weights import StoredWeights
from hf_awq_offload.pipeline import layer_quantization, scaling, stack_rounding
from hf_awq_offload.pipeline.run_storage import RunStorage
from hf_awq_offload.pipeline.structures import Structures

ERRORS = {
    "allocator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "Python": MemoryError,
}
SMALLER_BATCHES_HELP: dict[str, tuple[Any, str]] = {
    "reading": (StoredWeights, "of"),
    "onloading": (Onloader, "_take"),
    "probing": (Structures, "of"),
    "the forward pass": (ChainInputs, "run"),
}
NOTHING_HELPS: dict[str, tuple[Any, str, str]] = {
    "the skeleton": (opened_inputs, "record_skeleton", "'skeleton'"),
    "searching": (scaling, "search_group_scale", r"'search' of layer model\.layers\.\d"),
    "rounding": (layer_quantization, "_rounded", r"'search' of layer model\.layers\.\d"),
    "packing": (stack_rounding._RoundedStack, "packed", r"'search' of layer model\.layers\.\d"),
    "storing": (RunStorage, "store_layer", r"'commit' of layer model\.layers\.\d"),
}
"""What is called, and the phase that the error names."""
REPEATED = ("searching", "rounding", "packing")
"""Steps that are repeated with less at a time."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory) -> dict[str, str]:
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(llama, target, recipe())
    return digests(target)


def recipe() -> AwqOffloadConfig:
    return token_recipe(n_grid=1, clip=False)


def runs_out(monkeypatch, owner: Any, name: str, call: int, kind: str = "allocator", lasts: bool = False) -> None:
    """Has one call fail for want of memory; if it lasts, all that follow as well."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call or (lasts and len(calls) > call):
            raise ERRORS[kind]()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("kind", ERRORS)
def test_every_kind_of_error_is_recognized(kind):
    assert is_out_of_memory(ERRORS[kind]())
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("call", "kind"), [(1, "allocator"), (2, "driver")])
@pytest.mark.parametrize("where", SMALLER_BATCHES_HELP)
def test_a_layer_that_did_not_fit_runs_in_smaller_batches(where, call, kind, llama, expected, tmp_path, monkeypatch):
    source = digests(llama)
    runs_out(monkeypatch, *SMALLER_BATCHES_HELP[where], call + (where == "reading"), kind)  # the skeleton reads first
    quantize(llama, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out").keys() == expected.keys()
    assert digests(llama) == source
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("call", "kind"), [(1, "allocator"), (3, "driver")])
@pytest.mark.parametrize("where", REPEATED)
def test_a_step_of_the_search_that_did_not_fit_is_repeated_and_ends_the_same(
    where, call, kind, llama, expected, tmp_path, monkeypatch
):
    owner, name, _ = NOTHING_HELPS[where]
    runs_out(monkeypatch, owner, name, call, kind)
    quantize(llama, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize(("call", "kind"), [(1, "allocator"), (3, "driver")])
@pytest.mark.parametrize("where", NOTHING_HELPS)
def test_otherwise_the_error_names_the_phase_and_a_repeat_ends_the_same(
    where, call, kind, llama, expected, tmp_path, monkeypatch
):
    owner, name, phase = NOTHING_HELPS[where]
    if where in ("the skeleton", "storing"):
        call = min(call, 2 if where == "storing" else 1)
    source = digests(llama)
    with monkeypatch.context() as full:
        runs_out(full, owner, name, call, kind, lasts=True)
        with pytest.raises(MemoryLimitError, match=rf"ran out of memory .*phase {phase}: CUDA.* (Set|Free)"):
            quantize(llama, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert digests(llama) == source
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    quantize(llama, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", NOTHING_HELPS)
def test_a_model_in_memory_is_what_it_was_before(where, llama, monkeypatch):
    owner, name, phase = NOTHING_HELPS[where]
    model = tiny_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with monkeypatch.context() as full:
        runs_out(full, owner, name, 1 if where == "the skeleton" else 2, lasts=True)
        with pytest.raises(MemoryLimitError, match=rf"phase {phase}"):
            quantize_model(model, recipe())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    quantize_model(model, recipe())
    assert model.hf_quantizer.report is not None


def test_rounding_without_data_names_its_phase_too(llama, tmp_path, monkeypatch):
    runs_out(monkeypatch, layer_quantization, "round_to_nearest_and_pack", 9, lasts=True)
    nearest = AwqOffloadConfig(group_size=32, n_grid=0, clip=False, rounding="nearest")
    with pytest.raises(MemoryLimitError, match=r"in the phase 'search' of layer model\.layers\.1: CUDA out of memory"):
        quantize(llama, tmp_path / "out", nearest, checkpoint_dir=tmp_path / "journal")
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


class LargeLinear(nn.Linear):
    def forward(self, input):
        raise ERRORS["driver"]()


def test_a_linear_is_not_left_out_because_memory_ran_out_when_it_was_tried():
    with pytest.raises(RuntimeError, match="out of memory"):
        is_linear(LargeLinear(4, 4))
