"""Copies tensors between the host and a device so that the host seldom waits: many at once, or from pinned memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .logs import get_logger
from .machine_errors import is_out_of_memory

logger = get_logger(__name__)

Key = TypeVar("Key", bound=Hashable)


def all_to_host(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Returns the tensors of one device on the CPU. Views of the same values are copied once."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return dict(tensors)
    keys = {name: (x.data_ptr(), x.shape, x.stride(), x.dtype) for name, x in tensors.items()}
    distinct = {keys[name]: tensor.contiguous() for name, tensor in tensors.items()}
    as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in distinct.values()]
    parts = torch.cat(as_bytes).cpu().split([len(part) for part in as_bytes])
    copies = {
        key: part.clone().view(tensor.dtype).view(tensor.shape)  # a clone is aligned
        for (key, tensor), part in zip(distinct.items(), parts, strict=True)
    }
    return {name: copies[key] for name, key in keys.items()}


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Returns tensors of the CPU, all of one dtype and with one dimension, on the device."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    return list(torch.cat(list(tensors)).to(device).split([len(tensor) for tensor in tensors]))


def numbers_of(tensors: Sequence[Tensor]) -> list[float]:
    """Returns the numbers in all tensors, one after another; the host waits once for those on each device."""
    places = list(dict.fromkeys(tensor.device for tensor in tensors))
    read = {
        place: iter(torch.cat([each.flatten().double() for each in tensors if each.device == place]).tolist())
        for place in places
    }
    return [next(read[tensor.device]) for tensor in tensors for _ in range(tensor.numel())]


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the tensor on a device and in a dtype. The host does not wait for a CUDA device, if memory can be pinned.

    torch keeps the pinned memory until it was copied.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and (buffer := pinned_like(tensor)) is not None:
        tensor = buffer.copy_(tensor)
    return tensor.to(device=device, non_blocking=device.type == "cuda").to(dtype=dtype)


def pinned(tensor: Tensor) -> Tensor:
    """Returns a tensor of the CPU in pinned memory: a copy, or the tensor itself if it is pinned or nothing can be."""
    if tensor.is_pinned() or (buffer := pinned_like(tensor)) is None:
        return tensor
    return buffer.copy_(tensor)


def pinned_like(tensor: Tensor) -> Tensor | None:
    """Returns an empty CPU tensor in pinned memory; None if the machine has none to give.

    Where so little cannot be pinned that more is out of the question, nothing is tried again.
    """
    global _can_pin
    if not _can_pin:
        return None
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if not is_out_of_memory(error) or tensor.nbytes < LITTLE_BYTES:
            _can_pin = False
            logger.info("Memory could not be pinned (%s); copies to and from the accelerator make it wait.", error)
        return None


LITTLE_BYTES = 2**20

_can_pin = True
