"""A simulated GPU: device type "cuda" on a machine without one, for tests (docs/gpu.md).

    OMP_NUM_THREADS=1 PYTHONPATH=tests python -m simulated_gpu --devices 2 tests/offload     pytest, with two GPUs
    PYTHONPATH=tests python tests/simulated_gpu/layer_counts.py                              counts for a decoder layer

It changes torch for the whole process, so it always has a process of its own: `simulated_gpu.start()` comes before the
first import of torch. `test_on_simulated_gpu.py` starts such processes from an ordinary pytest run.

| file | job |
|---|---|
| device/ | the C++ part: allocator, streams, dispatch (device.cpp lists its files) |
| build.py | compiles it on first use |
| torch_cuda.py | what torch.cuda expects of its C extension |
| triton_stand_ins.py, int4_stand_ins.py, half_products.py | kernels that the CPU does not have |
| by_line.py | counters by line of the package |
| memory_by_shape.py | what is planned and what is taken, for layers of many shapes |
| observed.py | counters, findings, and limits of memory |
| plugin.py, __main__.py | pytest on the simulated GPU |
| suites.py | which of the product's tests run on it |
| inside/ | tests that only make sense on it |
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

MOST_DEVICES = 4  # kMostDevices of device/clocks.h


def is_active() -> bool:
    """Returns whether this process has the simulated GPU."""
    return "SIMULATED_GPU_STARTED" in os.environ and os.environ["SIMULATED_GPU_STARTED"] == str(os.getpid())


def start(devices: int = 1) -> None:
    """Gives this process simulated GPUs; compiles the C++ part if that was not done yet.

    Raises:
        RuntimeError: torch is imported already, or the simulated GPU can't be built here (build.why_not).
    """
    from .build import library, torch_folder

    if not 1 <= devices <= MOST_DEVICES:
        raise RuntimeError(f"{devices} simulated GPUs are asked for; expected 1 to {MOST_DEVICES}.")
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: it asks once whether there is CUDA. Call start() before.")
    path = library()
    os.environ["SIMULATED_GPU_DEVICES"] = str(devices)
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    os.environ["SIMULATED_GPU_STARTED"] = str(os.getpid())  # not true of processes that this one starts

    from . import half_products, int4_stand_ins, torch_cuda

    torch_cuda.install(devices)
    int4_stand_ins.install()
    half_products.install()


def add_project_to_path() -> None:
    """Lets scripts import the project's package and the helpers of its tests, wherever they are started."""
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(folder) for folder in (tests.parent, tests) if str(folder) not in sys.path]
