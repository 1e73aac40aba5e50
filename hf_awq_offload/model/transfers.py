"""Copies many small tensors between the host and a device at once: each copy of its own would be a wait of the host."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

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


def numbers_of(scalars: Sequence[Tensor]) -> list[float]:
    """Returns the values of tensors without dimensions, of fp32 precision at most."""
    return torch.stack([scalar.float() for scalar in scalars]).tolist() if scalars else []
