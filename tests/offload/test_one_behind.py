"""Calls run in a thread, in order, one behind the caller; memory that ran out beside others is no error."""

from __future__ import annotations

import threading

import pytest

from hf_awq_offload.offload.one_behind import OneBehind


@pytest.fixture
def behind():
    made = OneBehind("test")
    yield made
    made.close()


def test_calls_run_in_a_thread_in_their_order(behind):
    ran: list[tuple[int, str]] = []
    for number in range(3):
        behind.start(lambda number=number: ran.append((number, threading.current_thread().name)))
    behind.wait()
    assert [number for number, _ in ran] == [0, 1, 2]
    assert all(name.startswith("test") for _, name in ran)


def test_an_error_is_raised_once_by_the_next_call_or_wait(behind):
    def fail() -> None:
        raise OSError("no space")

    behind.start(fail)
    with pytest.raises(OSError, match="no space"):
        behind.start(lambda: None)
    behind.wait()
    behind.start(fail)
    with pytest.raises(OSError, match="no space"):
        behind.wait()
    behind.wait()


def test_a_call_that_runs_out_of_memory_is_repeated_by_who_waits(behind):
    threads: list[threading.Thread] = []

    def hungry() -> None:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise MemoryError

    behind.start(hungry)
    behind.wait()
    assert threads[1] is threading.current_thread()
    assert len(threads) == 2


def test_no_thread_starts_later(behind, monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ran: list[int] = []
    behind.start(lambda: ran.append(1))
    behind.wait()
    assert ran == [1]
