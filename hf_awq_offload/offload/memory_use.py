"""Measures the memory that is in use, and the most that was in use so far."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ..report import MemoryUse
from .devices import CPU

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_in_use_bytes(device: torch.device) -> int:
    """Returns the memory in use: the accelerator's allocations, or on a CPU the process's resident set."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    resident_bytes = status_bytes("VmRSS")
    return psutil.Process().memory_info().rss if resident_bytes is None else resident_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory in use since the last reset or the start; counts as `memory_in_use_bytes` does."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    peak_bytes = status_bytes("VmHWM")
    if peak_bytes is not None:
        return peak_bytes
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def status_bytes(field: str) -> int | None:
    """Returns a size from this process's status file, see proc(5); None on other systems than Linux."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


class MemoryWatch:
    """Reads the memory in use above what was in use when the watch was made. Resets no counter: others may read them.

    A peak is known once it exceeds the peak of the process's earlier life; until then, the most that was seen counts.

    Args:
        device: the execution device.
    """

    def __init__(self, device: torch.device):
        self._devices = [CPU] if device.type == "cpu" else [CPU, device]
        self._start_bytes = {watched: memory_in_use_bytes(watched) for watched in self._devices}
        self._earlier_peak_bytes = {watched: peak_memory_bytes(watched) for watched in self._devices}
        self._highest_bytes = dict(self._start_bytes)

    def now(self) -> MemoryUse:
        return MemoryUse(*(count_bytes for device in self._devices for count_bytes in self._read(device)))

    def _read(self, device: torch.device) -> tuple[int, int]:
        """Returns (in use, the most so far), above what was in use at the start."""
        in_use, peak, start = memory_in_use_bytes(device), peak_memory_bytes(device), self._start_bytes[device]
        if peak > self._earlier_peak_bytes[device]:
            self._highest_bytes[device] = max(self._highest_bytes[device], peak)
        self._highest_bytes[device] = max(self._highest_bytes[device], in_use)
        return max(0, in_use - start), self._highest_bytes[device] - start


class MemoryMeter:
    """Reads the peaks from its making on, above what was in use then. Resets the counters of peaks.

    Args:
        device: the execution device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.baseline_bytes: int | None = None
        with suppress(OSError):  # another system than Linux, or not allowed
            CLEAR_REFS.write_text("5")  # counts the peak of the resident set anew, see proc(5)
            self.baseline_bytes = memory_in_use_bytes(CPU)
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)

    def now_bytes(self) -> int:
        """Returns the RAM in use above what was in use at the start; 0 where that is unknown."""
        return 0 if self.baseline_bytes is None else memory_in_use_bytes(CPU) - self.baseline_bytes

    def peak_bytes(self) -> tuple[int | None, int]:
        """Returns (RAM, or None where that is unknown; accelerator, or 0)."""
        ram = None if self.baseline_bytes is None else peak_memory_bytes(CPU) - self.baseline_bytes
        return ram, 0 if self.device.type == "cpu" else peak_memory_bytes(self.device)
