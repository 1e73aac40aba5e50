"""Steps that run out of memory are repeated with less, in the order that costs least; what was given up stays so."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

from hf_awq_offload.offload.devices import CPU
from hf_awq_offload.offload.onloader import Onloader
from hf_awq_offload.offload.stored_weights import ReadAhead
from hf_awq_offload.pipeline import memory_pressure
from hf_awq_offload.pipeline.memory_pressure import BLOCKWISE_ELEMENTS, LEAST_ELEMENTS, MemoryPressure, what_helps
from hf_awq_offload.search.chunks import ACCELERATOR_ELEMENTS, at_once

GPU = torch.device("cuda", 0)
MANY = 2**40


class FakeOnloader:
    """Stands in for an onloader whose device is a GPU."""

    def __init__(self, reads_ahead: bool = True):
        self.device, self.reads_ahead = GPU, reads_ahead

    def stop_reading_ahead(self) -> bool:
        was, self.reads_ahead = self.reads_ahead, False
        return was


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(memory_pressure, "release_cached", lambda device: None)
    monkeypatch.setattr(memory_pressure, "trim_cache", lambda device, most_bytes: None)


def pressure(reads_ahead: bool = True, **changes: Any) -> MemoryPressure:
    return MemoryPressure(FakeOnloader(reads_ahead), GPU, **changes)  # type: ignore[arg-type]


def fitting(most: int, tried: list[int]):
    """Returns a step that fits in chunks of `most` weights."""

    def step() -> str:
        tried.append(at_once(MANY))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "done"

    return step


def test_a_step_that_fits_runs_once_in_the_usual_chunks():
    tried: list[int] = []
    under = pressure()
    assert under.attempt(fitting(MANY, tried)) == "done"
    assert tried == [MANY]
    assert under.chunk_elements is None
    assert under._onloader.reads_ahead  # type: ignore[attr-defined]


def test_reading_ahead_ends_first_then_chunks_are_halved_and_stay_so(caplog):
    tried: list[int] = []
    under = pressure()
    with caplog.at_level(logging.WARNING, logger="hf_awq_offload"):
        assert under.attempt(fitting(ACCELERATOR_ELEMENTS // 4, tried)) == "done"
    assert tried == [MANY, MANY, ACCELERATOR_ELEMENTS // 2, ACCELERATOR_ELEMENTS // 4]
    assert "without reading the next layer ahead" in caplog.text
    assert f"with {ACCELERATOR_ELEMENTS // 4} weights at a time" in caplog.text
    tried.clear()
    assert under.attempt(fitting(MANY, tried)) == "done"
    assert tried == [ACCELERATOR_ELEMENTS // 4], "the next layer is as large"


def test_other_room_is_made_last_and_then_the_error_is_raised():
    tried: list[int] = []
    made: list[str] = []
    under = pressure(reads_ahead=False)

    def make(name: str, helps: bool):
        return lambda: made.append(name) is None and helps

    with pytest.raises(torch.OutOfMemoryError):
        under.attempt(fitting(0, tried), make("nothing", helps=False), make("something", helps=True))
    assert made == ["nothing", "something"]
    assert under.grams_in_ram
    assert under.statistics_device == CPU
    again = tried.index(BLOCKWISE_ELEMENTS, tried.index(LEAST_ELEMENTS))
    assert tried[again - 2 : again] == [LEAST_ELEMENTS] * 2, "once more after room was made"
    assert tried[again:] == sorted(set(tried[again:]), reverse=True), "and in all sizes with gram matrices in RAM"
    assert tried[-1] == LEAST_ELEMENTS


def test_a_step_that_reads_no_statistics_gets_no_gram_matrices_from_ram():
    under = pressure(reads_ahead=False)
    with pytest.raises(torch.OutOfMemoryError):
        under.attempt(fitting(0, []))
    assert not under.grams_in_ram


def test_what_an_earlier_run_had_left_is_adopted_and_never_more():
    earlier, under = pressure(reads_ahead=False), pressure(reads_ahead=False)
    under.adopt({})  # a journal of an earlier release
    assert under.notes() == pressure(reads_ahead=False).notes()
    earlier.chunk_elements, earlier.grams_in_ram, earlier.statistics_device = 4096, True, CPU
    under.adopt(json.loads(json.dumps(earlier.notes())))
    assert under.notes() == earlier.notes()
    under.adopt({"device": "cuda", "chunk_elements": 8192, "statistics_in_ram": False, "grams_in_ram": False})
    assert under.notes() == earlier.notes()


def test_a_resumed_run_ends_at_the_chunks_of_the_run_that_left_gram_matrices_in_ram():
    earlier, under = pressure(reads_ahead=False), pressure(reads_ahead=False)
    for notes in ({"chunk_elements": 65536}, {"chunk_elements": BLOCKWISE_ELEMENTS, "grams_in_ram": True}):
        under.adopt({"device": "cuda", **notes})
    earlier.chunk_elements = 65536
    assert earlier._leave_grams(torch.OutOfMemoryError("out of memory"))
    assert under.notes() | {"statistics_in_ram": True} == earlier.notes()


def test_what_a_cpu_had_left_is_not_adopted_on_a_gpu():
    under = pressure(reads_ahead=False)
    under.adopt({"device": "cpu", "chunk_elements": 4096, "statistics_in_ram": True})
    assert under.notes() == pressure(reads_ahead=False).notes()


def test_a_step_that_was_given_a_gram_matrix_does_not_leave_it_in_ram():
    under, made = pressure(reads_ahead=False), []
    with pytest.raises(torch.OutOfMemoryError):
        under.attempt(fitting(0, []), lambda: made.append("room") is None and len(made) == 1, reads_grams_anew=False)
    assert made == ["room"]
    assert not under.grams_in_ram


def test_other_errors_are_not_repeated():
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        pressure().attempt(wrong)
    assert calls == [1]


def test_statistics_move_to_ram_once():
    under = pressure()
    assert under.move_statistics(torch.OutOfMemoryError("out of memory"))
    assert under.statistics_device == CPU
    assert not under.move_statistics(torch.OutOfMemoryError("out of memory"))


@pytest.mark.parametrize(
    ("phase", "helps"),
    [("forward", "max_seq_len"), ("forward", "batch_tokens"), ("search", "rounding='nearest'")],
)
def test_every_phase_says_what_helps_it(phase, helps):
    assert helps in what_helps(phase)
    assert "execution_device" in what_helps(phase)
    assert "execution_device" in what_helps("commit")


# -- reading ahead ---------------------------------------------------------------------------------------------------


def test_what_could_not_be_read_ahead_is_read_when_it_is_asked_for():
    reads: list[str] = []

    def read(name: str) -> str:
        reads.append(name)
        if reads == ["a", "b"]:
            raise RuntimeError("CUDA error: out of memory")  # of pinned memory
        return name.upper()

    ahead = ReadAhead(read, ["a", "b", "c"])
    assert [ahead.take(name) for name in "abc"] == ["A", "B", "C"]
    assert reads == ["a", "b", "b", "c"]
    ahead.close()


def test_other_errors_of_reading_ahead_are_raised():
    def read(name: str) -> str:
        if name == "b":
            raise OSError("the disk is gone")
        return name

    ahead = ReadAhead(read, ["a", "b"])
    ahead.take("a")
    with pytest.raises(OSError, match="gone"):
        ahead.take("b")
    ahead.close()


def test_reading_ahead_can_be_stopped():
    reads: list[str] = []
    ahead = ReadAhead(lambda name: reads.append(name) or name, ["a", "b", "c"])
    ahead.take("a")
    assert ahead.stop()
    assert not ahead.stop()
    assert [ahead.take(name) for name in "bc"] == ["b", "c"]
    assert reads.count("c") == 1
    ahead.close()


def test_an_onloader_without_prefetching_has_nothing_to_stop():
    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    own = Onloader(model, CPU, prefetch=False)
    own.expect(["0", "1", "2"])
    assert not own.stop_reading_ahead()
    own.close()
