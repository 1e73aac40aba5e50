"""Puts in place what torch.cuda expects of the C extension of a CUDA build. Its own Python runs on top of that."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CAPABILITY = (9, 0)
CUDA_VERSION = "13.0"


@dataclass(frozen=True)
class DeviceProperties:
    """What torch.cuda.get_device_properties returns; figures of an H100."""

    total_memory: int
    name: str = "simulated GPU"
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 48 << 10
    shared_memory_per_block_optin: int = 227 << 10
    shared_memory_per_multiprocessor: int = 228 << 10
    L2_cache_size: int = 50 << 20
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    gcnArchName: str = ""


class StreamBase(torch.Stream):
    """Stands for torch._C._CudaStreamBase."""

    def __new__(cls, priority: int = 0, **named: Any) -> StreamBase:
        if named:  # an existing stream, by stream_id, device_index and device_type
            return super().__new__(cls, **named)
        return super().__new__(cls, device=torch.device("cuda", torch.cuda.current_device()), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.native_handle if hasattr(self, "native_handle") else self.stream_id


class EventBase(torch.Event):
    """Stands for torch._C._CudaEventBase."""

    def __new__(cls, enable_timing: bool = False, **_: Any) -> EventBase:
        return super().__new__(cls, device="cuda", enable_timing=enable_timing)

    @property
    def cuda_event(self) -> int:
        return self.event_id

    def elapsed_time(self, end_event: torch.Event) -> float:
        """Returns 0: the device has no clock. torch's own function takes no subclass of torch.Event."""
        return 0.0


class Runtime:
    """Stands for torch.cuda.cudart()."""

    class cudaError:
        success = 0

    @staticmethod
    def cudaMemGetInfo(device: int) -> tuple[int, int]:
        return torch.accelerator.get_memory_info(device)

    @staticmethod
    def cudaGetErrorString(code: int) -> str:
        return f"CUDA error {code}"


def _exchange_device(index: int) -> int:
    return -1 if index < 0 else torch._C._accelerator_exchangeDevice(index)


def _nested(device: int) -> dict[str, Any]:
    """Returns the allocator's numbers as torch.cuda.memory_stats_as_nested_dict does."""
    result: dict[str, Any] = {}
    for path, number in dict(torch.ops.simulated_gpu.memory_stats(device)).items():
        *parents, name = path.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = number
    return result


def _stream_data(stream: torch.Stream) -> tuple[int, int, int]:
    return stream.stream_id, stream.device_index, stream.device_type


def _default_stream(index: int) -> tuple[int, int, int]:
    return 0, index, torch.accelerator.current_stream(index).device_type


def _extension(devices: int) -> dict[str, Callable[..., Any]]:
    """Functions of torch._C, by name."""
    operators, accelerator = torch.ops.simulated_gpu, torch.accelerator
    return {
        "_cuda_init": lambda: None,
        "_cuda_getDeviceCount": lambda: devices,
        "_cuda_getDevice": torch._C._accelerator_getDeviceIndex,
        "_cuda_setDevice": torch._C._accelerator_setDeviceIndex,
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _exchange_device,
        "_cuda_canDeviceAccessPeer": lambda device, peer: True,
        "_cuda_synchronize": lambda: accelerator.synchronize(),
        "_cuda_getCurrentStream": lambda index: _stream_data(accelerator.current_stream(index)),
        "_cuda_getDefaultStream": _default_stream,
        "_cuda_getCurrentRawStream": lambda index: accelerator.current_stream(index).stream_id,
        "_cuda_setStream": lambda **data: accelerator.set_stream(torch.Stream(**data)),
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_emptyCache": lambda *_: accelerator.empty_cache(),
        "_cuda_ipc_collect": lambda: None,
        "_cuda_memoryStats": _nested,
        "_cuda_resetPeakMemoryStats": accelerator.reset_peak_memory_stats,
        "_cuda_resetAccumulatedMemoryStats": accelerator.reset_accumulated_memory_stats,
        "_cuda_setMemoryFraction": operators.set_memory_fraction,
        "_cuda_getMemoryFraction": operators.memory_fraction,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_getArchFlags": lambda: f"sm_{CAPABILITY[0]}{CAPABILITY[1]}",
    }


def install(devices: int) -> None:
    """Makes torch.cuda work. Call it once, right after torch was imported with the C++ part loaded."""
    cuda = torch.cuda
    for name, function in _extension(devices).items():
        setattr(torch._C, name, function)
    torch._C._CudaStreamBase, torch._C._CudaEventBase = StreamBase, EventBase  # type: ignore[misc,assignment]
    streams = importlib.reload(cuda.streams)  # its classes derive from the two
    cuda.Stream, cuda.Event = streams.Stream, streams.Event  # type: ignore[misc,assignment]
    # What torch.cuda has looked up when it was imported, or gets from _cuda_init.
    replaced: dict[str, Any] = {
        "_cudart": Runtime,
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _exchange_device,
        "_device_count_nvml": lambda: -1,  # does not count cards that the machine has beside a CPU build of torch
        "_get_device_properties": lambda index: DeviceProperties(torch.accelerator.get_memory_info(index)[1]),
        # Random numbers come from the CPU's generator; these are there to be seeded, saved and restored.
        "default_generators": tuple(torch.Generator() for _ in range(devices)),
        "_initialized": True,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.graphs.is_current_stream_capturing = cuda.is_current_stream_capturing = lambda: False
    torch._C._has_cuda = True  # type: ignore[misc]
    torch.version.cuda = CUDA_VERSION
