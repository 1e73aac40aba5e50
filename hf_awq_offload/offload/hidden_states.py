"""Stores the calibration hidden states between two decoder layers, in RAM or in a memory-mapped file.

While a layer runs, both its inputs and its outputs exist, so that a layer that ran out of memory halfway, or a run that
was killed, can start over from the inputs. A file holds the bytes of the sequences one after the other, so its contents
do not depend on the micro-batches that it is read or written in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.durable import remove_link
from ..checkpoint.safetensors import bytes_of
from ..errors import JournalError, ModelStructureError, StorageError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class HiddenStates:
    """The inputs of a decoder layer, batch by batch."""

    batches: list[Tensor]  # each (sequences, tokens, ...), on the CPU
    file: Path | None = None  # the file that `batches` are views of

    @classmethod
    def from_file(cls, file: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> HiddenStates:
        """Maps `file` into memory; changes are not written back, and the file may be renamed or removed meanwhile."""
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.from_file(str(file), shared=False, size=sum(sizes), dtype=dtype)
        parts = zip(flat.split(sizes), shapes, strict=True)
        return cls([part.view(tuple(shape)) for part, shape in parts], file)

    @property
    def shapes(self) -> list[Shape]:
        return [tuple(batch.shape) for batch in self.batches]

    def regrouped(
        self,
        sizes: Sequence[int],  # sequences of each new batch
    ) -> HiddenStates:
        """Returns these sequences, in this order, in batches of other sizes."""
        sequences = [sequence for batch in self.batches for sequence in batch.unbind(0)]
        if sum(sizes) != len(sequences):
            raise JournalError(
                f"There are hidden states of {len(sequences)} sequences; expected {sum(sizes)}. The journal was "
                "changed after the run: delete its folder to quantize from the start."
            )
        groups = torch.arange(len(sequences)).split(list(sizes))
        if self.file is not None:
            shapes = [(len(group), *sequences[int(group[0])].shape) for group in groups]
            return HiddenStates.from_file(self.file, shapes, sequences[0].dtype)
        return HiddenStates([torch.stack([sequences[int(index)] for index in group]) for group in groups])


class HiddenWriter:
    """Stores a layer's outputs batch by batch.

    Args:
        file: the file to write to; None keeps the outputs in RAM.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.shapes: list[Shape] = []
        self.dtype: torch.dtype | None = None
        self._batches: list[Tensor] = []
        if file is not None:
            remove_link(file)
        self._opened = None if file is None else file.open("wb")

    def append(self, batch: Tensor) -> None:
        """Adds a batch, (sequences, tokens, ...) on the CPU; all batches have one dtype.

        Raises:
            ModelStructureError: its dtype differs from that of the batches before it.
            StorageError: the file could not be written.
        """
        if self.dtype not in (None, batch.dtype):
            raise ModelStructureError(
                f"A decoder layer returns {batch.dtype} for one batch and {self.dtype} for those before it; expected "
                "hidden states of one dtype. Load the model in one dtype (dtype=...)."
            )
        self.dtype = batch.dtype
        self.shapes.append(tuple(batch.shape))
        if self._opened is None:
            self._batches.append(batch)
            return
        data = bytes_of(batch.contiguous())
        try:
            self._opened.write(data)
        except OSError as error:
            raise StorageError(
                f"The hidden states could not be written to {self.file}: {error}. What was committed before is intact: "
                "make room, and repeat the call."
            ) from error

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def finish(self) -> HiddenStates:
        """Closes the file and returns all batches."""
        self.close()
        if self.file is None:
            return HiddenStates(self._batches)
        assert self.dtype is not None
        return HiddenStates.from_file(self.file, self.shapes, self.dtype)
