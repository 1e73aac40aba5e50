"""The process's resident memory on Linux, from /proc/self/status."""

from __future__ import annotations

from pathlib import Path


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def baseline_bytes() -> int:
    """What the interpreter and its modules take; from here on the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    return _status_bytes("VmHWM")
