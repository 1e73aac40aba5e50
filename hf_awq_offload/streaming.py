"""One decoder layer at a time on the execution device, by accelerate's cpu-offload hook."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import add_hook_to_module
from torch import nn


@contextmanager
def onloaded(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`layer` on `device` inside the context, back on the CPU after it, whatever happens inside.

    Modules that are put into `layer` inside the context travel back with it.
    """
    had_own_forward = "forward" in vars(layer)
    _, handle = cpu_offload_with_hook(layer, device)
    try:
        handle.hook.pre_forward(layer)
        yield layer
    finally:
        handle.offload()
        handle.remove()
        if not had_own_forward:
            vars(layer).pop("forward", None)  # accelerate puts the class's method back as an instance attribute


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Where accelerate has put a hook on `old` (a model on several devices), give it to `new` as well."""
    if hasattr(old, "_hf_hook"):
        add_hook_to_module(new, old._hf_hook)


def default_execution_device() -> torch.device:
    """The accelerator if the machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
    )


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to run a decoder layer in, None for its own.

    A CPU without instructions for half precision multiplies bf16 and fp16 matrices several times slower than fp32
    ones (docs/log.md); the copy of one layer that fp32 costs is small beside the model.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    supported = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return None if supported() else torch.float32


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: the accelerator's allocations, or on a CPU the process's resident set."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
