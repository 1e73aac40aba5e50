"""Compiles the C++ part with g++ on first use, into a cache named after what goes into it. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "device"
OLDEST_TORCH = (2, 13)
"""The C++ part overrides interfaces of torch that earlier releases do not have. A later one that changes them fails."""
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")


def torch_folder() -> Path:
    """Returns the folder of the installed torch, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed.")
    return Path(spec.origin).parent


def torch_versions() -> tuple[str, str | None]:
    """Returns torch's version, and the CUDA version that it was built for, or None for a CPU build."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(__version__|cuda)\b.*= *'([^']*)'", text, re.MULTILINE))
    return found["__version__"], found.get("cuda")


def why_not() -> str | None:
    """Returns why the simulated GPU can't be built on this machine, or None if it can."""
    version, cuda = torch_versions()
    if not sys.platform.startswith("linux"):
        return f"the simulated GPU has been built on Linux only, this is {sys.platform}"
    if cuda is not None:
        return f"the simulated GPU needs a CPU build of torch; {version} has CUDA of its own"
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        return f"the simulated GPU is written for torch {'.'.join(map(str, OLDEST_TORCH))} and later, this is {version}"
    if _compiler() is None:
        return "the simulated GPU needs a C++ compiler (g++, or another in the environment variable CXX)"
    return None


@cache
def library() -> Path:
    """Returns the compiled C++ part.

    Raises:
        RuntimeError: it can't be built here, or the compiler fails; with its messages.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    compiler = _compiler() or []
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_awq_offload-tests"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"simulated-gpu-{_key(compiler)}.so"
    with (folder / f"{path.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes start at once
        if not path.exists():
            _compile(compiler, path)
    return path


def _key(compiler: list[str]) -> str:
    parts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    parts += [version, " ".join([*compiler, *FLAGS]).encode(), torch_versions()[0].encode(), bytes(torch_folder())]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _compile(compiler: list[str], path: Path) -> None:
    torch = torch_folder()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / "device.so"
        command = [
            *compiler, *FLAGS, str(SOURCES / "device.cpp"), "-o", str(built),
            *(f"-isystem{folder}" for folder in (torch / "include", torch / "include/torch/csrc/api/include")),
            f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            raise RuntimeError(f"The simulated GPU does not compile: {shlex.join(command)}\n{result.stderr[-8000:]}")
        built.replace(path)


def _compiler() -> list[str] | None:
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None
