"""What a run takes on a GPU is what the planner says, and a run keeps to every limit from the plan's least on.

Reserved memory counts: what torch's allocator has taken from the card, whether tensors fill it or not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from killing import digests
from models import save_model, tiny_llama, token_batch
from stopped_runs import Stopped, stop_after
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_awq_offload import AwqOffloadConfig, MemoryLimitError, plan, planning, quantize, streamed
from hf_awq_offload.pipeline.budget import SEGMENT_BYTES, SMALL_SEGMENT_BYTES
from hf_awq_offload.pipeline.memory_pressure import MemoryPressure
from hf_awq_offload.search.chunks import ACCELERATOR_ELEMENTS

GPU = torch.device("cuda", torch.cuda.device_count() - 1)
MIB = 2**20
VOCABULARY = 64
LEAST_OF_PLAN = 0.85
"""Of what is planned, the least that a run takes: a plan is of little use if it is far too high."""
PIECES_BYTES = 2 * (SEGMENT_BYTES + SMALL_SEGMENT_BYTES)
"""Memory comes in pieces, of two sizes for each of two streams, and the last of them may hardly be filled."""


class Taken(NamedTuple):
    """What a run took, in bytes."""

    reserved: int
    allocated: int
    times_out_of_memory: int


def narrow_llama(hidden: int, intermediate: int = 512, heads: int = 4) -> PreTrainedModel:
    """Returns a layer with inputs of full width and few output channels: a wide layer that a CPU can search."""
    return tiny_llama(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=64, vocab_size=VOCABULARY,
    )  # fmt: skip


def qwen3_moe(experts: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_experts=experts,
            num_experts_per_tok=4, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            vocab_size=VOCABULARY, decoder_sparse_step=1,
        )
    )  # fmt: skip


def phi3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(
            hidden_size=512, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "hidden 256": lambda: narrow_llama(256, 704),
    "hidden 512": lambda: narrow_llama(512, 1408, heads=8),
    "hidden 1024": lambda: narrow_llama(1024, 2816, heads=16),
    "hidden 2048": lambda: narrow_llama(2048, 2048, heads=8),
    "hidden 4096": lambda: narrow_llama(4096),
    "hidden 8192": lambda: narrow_llama(8192, 256),
    "32 experts": lambda: qwen3_moe(32),
    "128 experts": lambda: qwen3_moe(128),
    "fused q, k and v": phi3,
}


IN_EVERY_BUILD = ("hidden 256", "32 experts", "fused q, k and v")
"""The others take minutes: MEMORY_BOUNDS=all has them, too."""


@pytest.fixture(scope="module", params=SHAPES if os.environ.get("MEMORY_BOUNDS") == "all" else IN_EVERY_BUILD)
def source(request, tmp_path_factory) -> Path:
    model = SHAPES[request.param]().to(torch.bfloat16)
    return save_model(model, tmp_path_factory.mktemp("shape") / "source")


def recipe(**changes: Any) -> AwqOffloadConfig:
    ids = token_batch(16, 128).remainder(VOCABULARY).tolist()
    fields = {
        "dataset": ids, "n_samples": 16, "max_seq_len": 128, "group_size": 64,
        "execution_device": str(GPU),
    }  # fmt: skip
    return AwqOffloadConfig(**fields | changes)


def taken(source: Path, out: Path, **changes: Any) -> Taken:
    """Quantizes without probing, from an empty cache."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    ooms = torch.cuda.memory_stats(GPU)["num_ooms"]
    quantize(source, out, recipe(**changes))
    return Taken(
        torch.cuda.max_memory_reserved(GPU),
        torch.cuda.max_memory_allocated(GPU),
        torch.cuda.memory_stats(GPU)["num_ooms"] - ooms,
    )


def planned_bytes(source: Path, **changes: Any) -> int:
    return plan(source, recipe(**changes), probe=False).accelerator_peak_bytes


def least_bytes(source: Path, monkeypatch) -> int:
    """Returns what a run takes at least, as the planner says if nothing is allowed."""
    with monkeypatch.context() as unchecked:
        unchecked.setattr(planning, "require_fit", lambda *args: None)
        return planned_bytes(source, max_memory={str(GPU): 1})


def test_a_run_takes_what_was_planned(source, tmp_path, record_property):
    planned, found = planned_bytes(source), taken(source, tmp_path / "out")
    record_property("planned, reserved, allocated MiB", (planned / MIB, found.reserved / MIB, found.allocated / MIB))
    assert found.times_out_of_memory == 0
    assert LEAST_OF_PLAN * planned - PIECES_BYTES <= found.reserved <= planned


def test_a_run_keeps_to_the_least_that_can_be_planned(source, tmp_path, monkeypatch):
    least = least_bytes(source, monkeypatch)
    assert least < planned_bytes(source)
    with pytest.raises(MemoryLimitError, match="of accelerator memory"):
        planned_bytes(source, max_memory={str(GPU): least - 1})
    found = taken(source, tmp_path / "out", max_memory={str(GPU): least})
    assert found.reserved <= least
    assert found.times_out_of_memory == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return save_model(narrow_llama(256, 704).to(torch.bfloat16), tmp_path_factory.mktemp("small") / "source")


@pytest.fixture(scope="module")
def files(small, tmp_path_factory) -> set[str]:
    """Returns the names of the files that a run without a limit writes."""
    out = tmp_path_factory.mktemp("unlimited") / "out"
    quantize(small, out, recipe(n_grid=2))
    return {path.name for path in out.iterdir()}


@pytest.mark.parametrize("limit_mib", [2, 8, 22, 26, 32, 44, 46, 64, 84])
def test_a_limit_is_kept_or_the_error_names_the_phase_and_what_helps(limit_mib, small, files, tmp_path, monkeypatch):
    """The plan is not checked, so that memory runs out wherever it does: in each phase of a run."""
    monkeypatch.setattr(streamed, "require_fit", lambda *args: None)
    found, message = None, ""
    try:
        found = taken(small, tmp_path / "out", n_grid=2, batch_tokens=2048, max_memory={str(GPU): limit_mib * MIB})
    except MemoryLimitError as error:
        message = str(error)
    if found is None:
        assert re.search(r"ran out of memory .*phase '(onload|structure|forward|search)'.*execution_device", message)
        assert limit_mib < 46, "a run in smaller pieces fits"
        assert not (tmp_path / "out").exists()
    else:
        assert found.reserved <= limit_mib * MIB
        assert {path.name for path in (tmp_path / "out").iterdir()} == files
    torch.empty(128 * MIB, device=GPU, dtype=torch.uint8)  # the limit is gone


def test_a_resumed_run_takes_the_memory_that_was_left(small, tmp_path, monkeypatch):
    """The first layer runs out of memory; the run that goes on after it has all the memory, but repeats its pieces."""
    monkeypatch.setattr(streamed, "require_fit", lambda *args: None)
    asked = {"n_grid": 2, "batch_tokens": 2048}
    limited = asked | {"max_memory": {str(GPU): 46 * MIB}}
    quantize(small, tmp_path / "reference", recipe(**limited))
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):
            quantize(small, tmp_path / "out", recipe(**limited), checkpoint_dir=tmp_path / "journal")
    left: list[dict[str, Any]] = []
    notes = MemoryPressure.notes
    monkeypatch.setattr(MemoryPressure, "notes", lambda pressure: left.append(notes(pressure)) or left[-1])
    quantize(small, tmp_path / "out", recipe(**asked), checkpoint_dir=tmp_path / "journal")
    assert [each["chunk_elements"] < ACCELERATOR_ELEMENTS for each in left] == [True]
    assert digests(tmp_path / "out") == digests(tmp_path / "reference")
