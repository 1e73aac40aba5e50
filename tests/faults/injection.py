"""Makes system calls fail in this process, wherever they are made: in Python, in safetensors' Rust, in other threads.

A process has to be started with `environment(library)`; failing_calls.c says which calls can fail.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FROM_THEN_ON, ALSO_REMOVALS, ONLY_READS = 1, 2, 4
VARIABLE = "LD_PRELOAD"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and for how long."""

    name: str
    number: int
    """The errno."""
    how: int = 0


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("full", errno.ENOSPC, FROM_THEN_ON),
        Fault("full for a moment", errno.ENOSPC),
        Fault("read-only", errno.EROFS, FROM_THEN_ON | ALSO_REMOVALS),
        Fault("forbidden", errno.EACCES),
        Fault("damaged", errno.EIO),
    )
}


def build(folder: Path) -> Path:
    """Compiles the library into a folder; returns it."""
    library = folder / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl", "-lpthread"], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """Returns the variables of a process in which calls can fail."""
    return {VARIABLE: str(library)}


@dataclass
class Counted:
    """The calls that were seen, each as its name and path."""

    calls: list[str] = field(default_factory=list)


@contextmanager
def failing(folders: Sequence[Path], call: int, fault: Fault) -> Iterator[Counted]:
    """Makes one call on files below `folders` fail, counted from 1; with 0 none fails. Tells which calls there were."""
    library = ctypes.CDLL(os.environ[VARIABLE])
    library.faults_log.restype = ctypes.c_char_p
    paths = ":".join(str(folder.resolve()) for folder in folders)
    library.faults_arm(paths.encode(), ctypes.c_long(call), fault.number, fault.how)
    counted = Counted()
    try:
        yield counted
    finally:
        library.faults_disarm()
        counted.calls = library.faults_log().decode().splitlines()


def swept(library: Path, folder: Path, operation: str, fault: str, every: int, first: int = 1) -> list[dict[str, Any]]:
    """Runs sweeping.py in a process of its own; returns how many calls there are, then what each failure did."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parents[1]), str(here.parent), *filter(None, sys.path)])
    command = [sys.executable, str(here / "sweeping.py"), str(folder), operation, fault]
    command += ["--every", str(every), "--first", str(first)]
    env = os.environ | environment(library) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise AssertionError(result.stderr[-2000:])
    return [json.loads(line) for line in result.stdout.splitlines()]
