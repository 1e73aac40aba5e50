"""How much memory there is, and how much was in use at most."""

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
"""Of mallopt(3)."""

CPU = torch.device("cpu")

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def default_execution_device() -> torch.device:
    """The accelerator if the machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return CPU
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether smaller micro-batches may help."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def release_cached(device: torch.device) -> None:
    """Give memory that the allocator holds for later back to the accelerator."""
    if device.type != "cpu":
        clear_device_cache()


def memory_in_use_bytes(device: torch.device) -> int:
    """Memory in use now: the accelerator's allocations, or on a CPU the process's resident set."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    resident_bytes = _status_bytes("VmRSS")
    return psutil.Process().memory_info().rss if resident_bytes is None else resident_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far, since the last reset if there was one; counted as in `memory_in_use_bytes`."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    peak_bytes = _status_bytes("VmHWM")
    if peak_bytes is not None:
        return peak_bytes
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def _status_bytes(field: str) -> int | None:
    """What Linux says of this process in proc(5); None where it does not."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def accelerator_bytes(device: torch.device) -> tuple[int, int]:
    """Of an accelerator's memory: (free, all)."""
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


@contextmanager
def at_most(limits: Mapping[torch.device, int | None]) -> Iterator[None]:
    """Inside, allocating beyond a limit fails as it does when memory is used up.

    On CUDA torch's allocator keeps to it. The CPU's is a limit on the process's private memory (RLIMIT_DATA, Linux),
    counted from what it has now; mapped files do not count.
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
    torch.ones(512, 512) @ torch.ones(512, 512)  # threads are there from now on; their stacks would count
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    private_bytes = _status_bytes("VmData")
    if private_bytes is None:
        return
    allowed = private_bytes + limit_bytes
    if any(most != resource.RLIM_INFINITY and most < allowed for most in (soft, hard)):
        return  # less is allowed already
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))


def release_freed() -> None:
    """Give memory that was freed back to the system.

    glibc keeps what was freed between blocks that are in use. Layer after layer that adds up to a resident set that
    grows with the depth of the model (docs/log.md); other C libraries are left alone.
    """
    if _C_LIBRARY is not None:
        _C_LIBRARY.malloc_trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside, glibc maps every block of 1 MiB and more on its own, and gives it back when it is freed.

    By itself it raises that size to up to 32 MiB and then keeps such blocks in its heap, in pieces that fit the next
    layer's badly: address space and resident set grow layer by layer. It can't be set back to raise it by itself;
    afterwards it stands at those 32 MiB.
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
    """Memory in use above what there was when it was made. It resets no counter: others may be reading them.

    A peak is known once it exceeds that of the process's earlier life; until then it is the most that was seen.

    Args:
        device: the execution device.
    """

    def __init__(self, device: torch.device):
        self._devices = [CPU] if device.type == "cpu" else [CPU, device]
        self._start_bytes = {each: memory_in_use_bytes(each) for each in self._devices}
        self._earlier_peak_bytes = {each: peak_memory_bytes(each) for each in self._devices}
        self._highest_bytes = dict(self._start_bytes)

    def now(self) -> MemoryUse:
        return MemoryUse(*(count_bytes for device in self._devices for count_bytes in self._read(device)))

    def _read(self, device: torch.device) -> tuple[int, int]:
        """(in use, the most so far), above what there was at the start."""
        in_use, peak, start = memory_in_use_bytes(device), peak_memory_bytes(device), self._start_bytes[device]
        if peak > self._earlier_peak_bytes[device]:
            self._highest_bytes[device] = max(self._highest_bytes[device], peak)
        self._highest_bytes[device] = max(self._highest_bytes[device], in_use)
        return max(0, in_use - start), self._highest_bytes[device] - start


class MemoryMeter:
    """The peaks from now on, above what is in use now.

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
        """RAM in use now, above what was at the beginning; 0 where that can't be told."""
        return 0 if self.baseline_bytes is None else memory_in_use_bytes(CPU) - self.baseline_bytes

    def peak_bytes(self) -> tuple[int | None, int]:
        """(RAM or None where that can't be told, accelerator or 0)."""
        ram = None if self.baseline_bytes is None else peak_memory_bytes(CPU) - self.baseline_bytes
        return ram, 0 if self.device.type == "cpu" else peak_memory_bytes(self.device)
