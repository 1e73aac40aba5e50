"""What the simulated GPU has seen: counters and findings. Also sets how much memory it has."""

from __future__ import annotations

import torch
from torch import Tensor


def counters() -> dict[str, int]:
    """Returns totals since `reset_counters`: launches, synchronizations, copies, their bytes, flops of products."""
    return dict(torch.ops.simulated_gpu.totals())


def launches_by_operation() -> dict[str, int]:
    return dict(torch.ops.simulated_gpu.launches_by_operation())


def synchronizations_by_reason() -> dict[str, int]:
    return dict(torch.ops.simulated_gpu.synchronizations_by_reason())


def reset_counters() -> None:
    torch.ops.simulated_gpu.reset_counters()


def findings() -> list[str]:
    """Returns what streams did without waiting for each other, one sentence each."""
    return list(torch.ops.simulated_gpu.findings())


def clear_findings() -> None:
    torch.ops.simulated_gpu.clear_findings()


def set_total_bytes(count: int, device: int = 0) -> None:
    """Sets the memory of a device, in bytes."""
    torch.ops.simulated_gpu.set_total_bytes(count, device)


def cpu_alias(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor on the same memory."""
    return torch.ops.simulated_gpu.cpu_alias(tensor)


def count_launch(operation: str, reads: list[Tensor], writes: list[Tensor], device: int) -> None:
    """Notes a kernel that torch does not see, on the current stream of a device."""
    torch.ops.simulated_gpu.count_launch(operation, reads, writes, device)
