"""Times and memory of the CUDA device.

Times are medians. What warms up (compiling, caches) runs before and is left out. The simulated device has no clock: it
takes no time, so there are no times there, and no rates.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

GIB = 2**30
Call = Callable[[], Any]


def milliseconds(calls: Sequence[Call], runs: int, warm_up: int = 3) -> float:
    """Returns the time of one call in ms by the card's clock, NaN where it has none: events around all of `calls`.

    They run one after the other; what the card waits for the host between them is part of it.
    """
    for _ in range(warm_up):
        for call in calls:
            call()
    times_ms = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times_ms.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times_ms) or math.nan


def host_milliseconds(call: Call, runs: int, warm_up: int = 1) -> float:
    """Returns the median time of one call in ms, by the host's clock, until the card has finished."""
    for _ in range(warm_up):
        call()
    times_ms = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times_ms)


def graph_of(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Captures the calls, one after the other, after they have run on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def copy_gb_per_s(count_bytes: int) -> float:
    """Returns the rate of a copy on the device in 10⁹ bytes per second, counting those read and those written."""
    source = torch.ones(count_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return rate(2 * count_bytes, milliseconds([lambda: target.copy_(source)] * 4, 7)) / 1e9


def rate(amount: float, took_ms: float) -> float:
    """Returns `amount` per second."""
    return amount / took_ms * 1e3


class Peak:
    """Measures a stretch of a run: its seconds, and the memory at most, beyond what was in use when it began."""

    seconds = 0.0
    allocated_bytes = 0
    reserved_bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._allocated, self._reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._start
        self.allocated_bytes = torch.cuda.max_memory_allocated() - self._allocated
        self.reserved_bytes = torch.cuda.max_memory_reserved() - self._reserved
