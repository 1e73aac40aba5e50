"""The calibration hidden states between two decoder layers: in RAM, or in a file that is mapped into memory.

Two generations exist while a layer runs, its inputs and its outputs: a layer that ran out of memory half way, or a run
that was killed, starts over from the inputs. A file holds the bytes of the sequences one after the other, so that it
says the same whatever micro-batches it is read in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.safetensors import bytes_of
from ..errors import ModelStructureError, StorageError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class HiddenStates:
    """What enters a decoder layer, batch by batch."""

    batches: list[Tensor]  # each (sequences, tokens, ...), on the CPU
    file: Path | None = None  # what `batches` are views of

    @classmethod
    def from_file(cls, file: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> HiddenStates:
        """Mapped: read when used, readable when the file is renamed or removed; changes do not reach the file."""
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
        """The same sequences in the same order, in batches of other sizes."""
        sequences = [sequence for batch in self.batches for sequence in batch.unbind(0)]
        assert sum(sizes) == len(sequences)
        groups = torch.arange(len(sequences)).split(list(sizes))
        if self.file is not None:
            shapes = [(len(group), *sequences[int(group[0])].shape) for group in groups]
            return HiddenStates.from_file(self.file, shapes, sequences[0].dtype)
        return HiddenStates([torch.stack([sequences[int(index)] for index in group]) for group in groups])


class HiddenWriter:
    """Takes a layer's outputs batch by batch.

    Args:
        file: where they go; None keeps them in RAM.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.shapes: list[Shape] = []
        self.dtype: torch.dtype | None = None
        self._batches: list[Tensor] = []
        self._digest = hashlib.sha256()
        self._opened = None if file is None else file.open("wb")

    def append(self, batch: Tensor) -> None:
        """`batch` is (sequences, tokens, ...) on the CPU; all of one dtype.

        Raises:
            ModelStructureError: its dtype is another one than those before had.
            StorageError: the file can't be written.
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
        self._digest.update(data)
        try:
            self._opened.write(data)
        except OSError as error:
            raise StorageError(
                f"The hidden states can't be written to {self.file}: {error}. What was committed before is whole: make "
                "room, and repeat the call."
            ) from error

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes written to a file."""
        return self._digest.hexdigest()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def finish(self) -> HiddenStates:
        """The batches that were taken."""
        self.close()
        if self.file is None:
            return HiddenStates(self._batches)
        assert self.dtype is not None
        return HiddenStates.from_file(self.file, self.shapes, self.dtype)
