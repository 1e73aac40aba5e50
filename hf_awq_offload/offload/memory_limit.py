"""Enforces the memory bound of a run: limits what can be allocated, and returns freed memory to the system."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .memory_use import status_bytes

M_MMAP_THRESHOLD = -3
"""The parameter of mallopt(3) that sets from which size blocks are mapped on their own."""


@contextmanager
def at_most(limits: Mapping[torch.device, int | None]) -> Iterator[None]:
    """Makes allocations beyond a limit fail inside the context, as they fail when memory is used up.

    On CUDA torch's allocator enforces the limit. On a CPU it limits the process's private memory (RLIMIT_DATA, Linux),
    counted from what the process has now; files that are mapped without leave to write do not count.
    """
    with ExitStack() as stack:
        for device, limit_bytes in limits.items():
            if limit_bytes is None:
                continue
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                earlier = torch.cuda.get_per_process_memory_fraction(device)  # the caller may have set a limit, too
                torch.cuda.set_per_process_memory_fraction(min(earlier, limit_bytes / total), device)
                stack.callback(torch.cuda.set_per_process_memory_fraction, earlier, device)
            elif device.type == "cpu" and hasattr(resource, "RLIMIT_DATA"):
                _limit_private_memory(limit_bytes, stack)
        yield


def _limit_private_memory(limit_bytes: int, stack: ExitStack) -> None:
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads, whose stacks would count
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    private_bytes = status_bytes("VmData")
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
