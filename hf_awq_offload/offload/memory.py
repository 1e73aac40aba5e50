"""Measures and limits memory: what a device has, what is in use, and the most that was in use."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..report import MemoryUse

M_MMAP_THRESHOLD = -3
"""The parameter of mallopt(3) that sets from which size blocks are mapped on their own."""

CPU = torch.device("cpu")

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def default_execution_device() -> torch.device:
    """Returns the accelerator if the machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return CPU
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, so that smaller micro-batches may help."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def release_cached(device: torch.device) -> None:
    """Returns the memory that the allocator has cached to the accelerator."""
    if device.type != "cpu":
        clear_device_cache()


def memory_in_use_bytes(device: torch.device) -> int:
    """Returns the memory in use: the accelerator's allocations, or on a CPU the process's resident set."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    resident_bytes = _status_bytes("VmRSS")
    return psutil.Process().memory_info().rss if resident_bytes is None else resident_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory in use since the last reset or the start; counts as `memory_in_use_bytes` does."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    peak_bytes = _status_bytes("VmHWM")
    if peak_bytes is not None:
        return peak_bytes
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def _status_bytes(field: str) -> int | None:
    """Returns a size from this process's status file, see proc(5); None on other systems than Linux."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def accelerator_bytes(device: torch.device) -> tuple[int, int]:
    """Returns an accelerator's memory as (free, total)."""
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


@contextmanager
def at_most(limits: Mapping[torch.device, int | None]) -> Iterator[None]:
    """Makes allocations beyond a limit fail inside the context, as they fail when memory is used up.

    On CUDA torch's allocator enforces the limit. On a CPU it limits the process's private memory (RLIMIT_DATA, Linux),
    counted from what the process has now; mapped files do not count.
    """
    with ExitStack() as stack:
        for device, limit_bytes in limits.items():
            if limit_bytes is None:
                continue
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
                stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0, device)
            elif device.type == "cpu" and hasattr(resource, "RLIMIT_DATA"):
                _limit_private_memory(limit_bytes, stack)
        yield


def _limit_private_memory(limit_bytes: int, stack: ExitStack) -> None:
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads, whose stacks would count
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    private_bytes = _status_bytes("VmData")
    if private_bytes is None:
        return
    allowed = private_bytes + limit_bytes
    if any(most != resource.RLIM_INFINITY and most < allowed for most in (soft, hard)):
        return  # a lower limit is set already
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))


def release_freed() -> None:
    """Returns freed memory to the system, where the C library is glibc.

    glibc keeps freed blocks that lie between blocks in use. Layer after layer, the resident set would grow with the
    depth of the model (docs/log.md).
    """
    if _C_LIBRARY is not None:
        _C_LIBRARY.malloc_trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Has glibc map every block of 1 MiB and more on its own inside the context, and return it when it is freed.

    By default glibc raises that size by itself, up to 32 MiB, and keeps smaller blocks in its heap, in pieces that fit
    the next layer badly: address space and resident set grow layer by layer. The automatic rise cannot be switched on
    again; on exit the size is 32 MiB.
    """
    if _C_LIBRARY is None:
        yield
        return
    _C_LIBRARY.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        _C_LIBRARY.mallopt(M_MMAP_THRESHOLD, 32 << 20)


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # no such library, or Windows
        return None


_C_LIBRARY = _glibc()


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
