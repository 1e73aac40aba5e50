"""Gives transformers the tensors of a source: dequantized, or none at all where the weights stay on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import StoredTensor, read
from ..errors import CheckpointError


class SourceReading:
    """Decides what transformers gets to see of a source's tensors.

    Args:
        source: the source.
        as_stored: its tensors that become parameters of the model without any conversion.
        is_lazy: whether weights stay on the disk; asked when transformers reads.
    """

    def __init__(self, source: Source, as_stored: set[str], is_lazy: Callable[[], bool]):
        self.source, self.as_stored, self.is_lazy = source, as_stored, is_lazy
        self.was_used = False

    def serves(self, file: str) -> bool:
        """Whether transformers should read this file through `open`."""
        return Path(file) in self.source.by_file and (self.source.format is not None or self.is_lazy())

    def open(self, file: str) -> _SourceFile:
        """Returns what transformers takes for an open safetensors file."""
        self.was_used = True
        return _SourceFile(self, self.source.by_file[Path(file)])

    def tensor(self, name: str, stored: StoredTensor) -> Tensor:
        """Returns a tensor. Only its shape and dtype are right if it is a parameter that stays on the disk.

        transformers drops such tensors. It needs the values of buffers, and of what it converts.
        """
        if self.is_lazy() and name in self.as_stored:
            return torch.zeros((), dtype=stored.torch_dtype).expand(stored.shape)
        return read(stored)

    def require_use(self) -> None:
        """Raises CheckpointError if transformers has read a quantized source without this reader."""
        if self.source.format is not None and not self.was_used:
            raise CheckpointError(
                f"The checkpoint's weights are {self.source.format.name}, and transformers has read them as they are "
                "stored: with disable_mmap=True, or from a mounted hub folder, it opens files in a way of its own. "
                "Leave disable_mmap out, and load from a folder on this machine."
            )


class _SourceFile:
    """Gives transformers what it asks of an open safetensors file."""

    def __init__(self, reading: SourceReading, tensors: Mapping[str, StoredTensor]):
        self.reading, self.tensors = reading, tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> _SourceTensor:
        return _SourceTensor(self.reading, name, self.tensors[name])

    def __exit__(self, *error: Any) -> None:
        """Nothing is open."""


class _SourceTensor:
    """Stands for a tensor of a file until transformers takes it by `[...]`."""

    def __init__(self, reading: SourceReading, name: str, stored: StoredTensor):
        self.reading, self.name, self.stored = reading, name, stored

    def __getitem__(self, everything: Any) -> Tensor:
        return self.reading.tensor(self.name, self.stored)
