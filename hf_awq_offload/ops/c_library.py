"""Compiles c_kernels/ with the system's GCC, once per machine, and loads the result.

The library is stored in `$HF_HOME/hf_awq_offload`, under a name that depends on the source, the flags and the CPU,
because machines may share a home. Compiling takes less than a second. The library contains no OpenMP runtime: its calls
bind to the one that torch has loaded, so that there is only one thread pool.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from ..formats.awq import PackedWeight
from ..logs import get_logger

logger = get_logger(__name__)

FOLDER = "c_kernels"
SOURCES = ("words.h", "product.c", "dequantize.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
COMPILERS = ("gcc", "cc")
COMPILE_TIMEOUT_SECONDS = 120
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""The dtypes that the kernels support, with their numbers in C."""


class KernelsUnavailable(Exception):
    """Raised with the reason why there are no compiled kernels; `library` returns it as text."""


def weight_arguments(packed: PackedWeight) -> tuple[int, ...]:
    """Returns a kernel's first arguments, among them addresses of tensors.

    The tensors must be contiguous and have passed `schema.check_packed`.
    """
    qweight, qzeros, scales = packed
    in_features, width = qweight.shape
    group_size = in_features // scales.shape[0]
    addresses = qweight.data_ptr(), qzeros.data_ptr(), scales.data_ptr()
    return *addresses, DTYPES[scales.dtype], in_features, width, group_size


@cache
def library() -> ctypes.CDLL | str:
    """Returns the compiled kernels, or the reason why there are none."""
    if os.name != "posix":
        return f"its kernels have not been tested on {platform.system()}"
    try:
        return load()
    except KernelsUnavailable as error:
        logger.warning(f"C kernels for quantized linears on the CPU are unavailable, and others are slower: {error}.")
        return str(error)


def load() -> ctypes.CDLL:
    """Loads the kernels, and compiles them first unless they are in the cache.

    Raises:
        KernelsUnavailable: there is no compiler, or its output could not be loaded.
    """
    try:
        return _open_own(built(Path(HF_HOME) / "hf_awq_offload"))
    except OSError:  # the folder is not writable, is writable by others, or forbids executables
        with tempfile.TemporaryDirectory() as folder:
            try:
                return _open_own(built(Path(folder)))
            except OSError as error:
                raise KernelsUnavailable(f"the compiled kernels could not be loaded: {error}") from error


def built(folder: Path) -> Path:
    """Returns the path of the library in `folder`, and compiles it if needed.

    Raises:
        KernelsUnavailable: there is no compiler, or it fails.
        OSError: the folder is not writable, or other users can change its contents.
    """
    texts = {name: (resources.files(__package__) / FOLDER / name).read_bytes() for name in SOURCES}
    key = hashlib.sha256(b"\0".join([*texts.values(), " ".join(FLAGS).encode(), cpu().encode()])).hexdigest()[:16]
    path = folder / f"kernels-{key}.so"
    if folder.exists():
        _require_own(folder.stat(), folder)
    if not is_whole(path):
        compiler = find_compiler()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # if processes race, the last wins
            for name, text in texts.items():
                (Path(scratch) / name).write_bytes(text)
            for command in commands(compiler):
                _run(command, scratch)
            linked = Path(scratch) / "kernels.so"
            content = linked.read_bytes()
            linked.write_bytes(content + hashlib.sha256(content).digest())
            linked.chmod(0o500)
            os.replace(linked, path)
    _require_own(folder.stat(), folder)
    _require_own(path.stat(), path)
    return path


def _require_own(status: os.stat_result, path: Path) -> None:
    """Raises PermissionError if another user can change what was looked at."""
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be changed by other users")


def commands(compiler: list[str]) -> list[list[str]]:
    """Returns the commands that build kernels.so from SOURCES in the working folder."""
    units = [Path(name).stem for name in SOURCES if name.endswith(".c")]
    return [
        [*compiler, *FLAGS, "-c", *(f"{unit}.c" for unit in units)],
        # Without -fopenmp, which would link a second OpenMP runtime.
        [*compiler, "-shared", *(f"{unit}.o" for unit in units), "-o", "kernels.so"],
    ]


def is_whole(path: Path) -> bool:
    """Returns whether the library exists and ends in the digest of the rest; loading a truncated one would crash."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return False
    return _ends_in_digest(content)


def _ends_in_digest(content: bytes) -> bool:
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def find_compiler() -> list[str]:
    """Returns the compiler's command: the environment variable CC, or the first of COMPILERS in the path.

    Raises:
        KernelsUnavailable: there is none.
    """
    own = os.environ.get("CC", "").strip()
    names = (own,) if own else COMPILERS
    for name in names:
        command = shlex.split(name)  # CC may be "ccache gcc"
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise KernelsUnavailable(f"no C compiler found ({' or '.join(names)}); install gcc, or set CC")


def cpu() -> str:
    """Returns a text that differs between CPUs for which the compiler generates different code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return " ".join([platform.system(), platform.machine(), platform.processor(), features])


def _run(command: list[str], folder: str) -> None:
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise KernelsUnavailable(f"{command[0]} was still running after {error.timeout:.0f} seconds") from error
    if result.returncode:
        status = f"exit status {result.returncode}"
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip() or status)
        raise KernelsUnavailable(f"{command[0]} fails: {first}")


def _open_own(path: Path) -> ctypes.CDLL:
    """Opens a library that no other user can have put there or changed.

    It is opened once, checked and loaded by its descriptor: where others can write to a folder above, the name may lead
    to another file a moment later.

    Raises:
        OSError: the file is a link or another user's, is damaged, or can't be loaded.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:
        _require_own(os.fstat(descriptor), path)
        if not _ends_in_digest(opened.read()):
            raise OSError(f"{path} is damaged")
        by_descriptor = Path(f"/proc/self/fd/{descriptor}")
        return _open(by_descriptor if by_descriptor.exists() else path)


def _open(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    weight = (pointer, pointer, pointer, integer, integer, integer, integer)
    kernels.awq_product.argtypes = (*weight, pointer, integer, integer, pointer, pointer, integer, integer)
    kernels.awq_dequantize.argtypes = (*weight, integer, integer, pointer, integer, integer)
    kernels.awq_product.restype = kernels.awq_dequantize.restype = None
    return kernels
