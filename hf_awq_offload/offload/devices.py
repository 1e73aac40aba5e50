"""The execution device: which one it is, how much memory it has, and how its cache is emptied."""

from __future__ import annotations

import torch
from accelerate.utils.memory import clear_device_cache

CPU = torch.device("cpu")


def default_execution_device() -> torch.device:
    """Returns the accelerator if the machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return CPU
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def accelerator_bytes(device: torch.device) -> tuple[int, int]:
    """Returns an accelerator's memory as (free, total)."""
    free, total = torch.accelerator.get_memory_info(device)
    return int(free), int(total)


def trim_cache(device: torch.device, most_bytes: int) -> None:
    """Returns the memory that the allocator has cached to a CUDA device if it is more than `most_bytes`.

    Blocks that one step of a search has left fit the next one badly, and the card would fill up with them.
    """
    if device.type == "cuda" and torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > most_bytes:
        torch.cuda.empty_cache()


def release_cached(device: torch.device) -> None:
    """Returns the memory that the allocator has cached to the accelerator."""
    if device.type != "cpu":
        clear_device_cache()
