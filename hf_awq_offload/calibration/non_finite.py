"""Finds the calibration sequence that first brought a linear's input a value that statistics can't take.

A value is bad if its square is not finite in fp32: NaN, infinite, or beyond 1.8e19. Looking at each batch at once would
make the host wait for the accelerator, so the first bad row is kept on the device until somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLACES = 2**32
"""A bad row is noted as batch · PLACES + its place in the batch."""
NOT_KNOWN = PLACES - 1
"""The place of a row that can't be traced to a sequence: an expert's, or of a layer that mixes tokens."""


class FirstNonFinite:
    """Notes, for each named input, the first row whose sum of squares is not finite."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor | None, Sequence[int]]] = []
        self._first: dict[str, Tensor] = {}
        """Input -> () int64 on the execution device: -1 while no row was bad."""

    def begin_batch(
        self,
        counted: Tensor | None,  # (batch, tokens) bool; None: all
        sequences: Sequence[int],  # number of each of the batch's sequences
    ) -> None:
        """Says what the next batch holds."""
        self._batches.append((counted, sequences))

    def watch(
        self,
        name: str,  # of the input
        x: Tensor,  # (..., in), what the linear was given
        rows: Tensor,  # (tokens, in), what of it is counted
    ) -> None:
        """Looks at the input of one call of a linear."""
        if not self._batches or not rows.shape[0]:
            return
        counted, sequences = self._batches[-1]
        bad = ~torch.isfinite(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square_())
        place = bad.to(torch.int64).argmax()
        if counted is None and x.ndim == 3 and x.shape[0] == len(sequences):
            place = place // x.shape[1]
        elif counted is None or x.shape[:-1] != counted.shape:  # else it is looked up in the mask when somebody asks
            place = torch.full_like(place, NOT_KNOWN)
        before = self._first.get(name, torch.full_like(place, -1))
        noted = place + (len(self._batches) - 1) * PLACES
        self._first[name] = torch.where((before < 0) & bad.any(), noted, before)

    def sequences(self, name: str) -> list[int]:
        """Returns the number of the sequence; of all in its batch if it can't be told; none if no row was bad."""
        first = int(self._first[name]) if name in self._first else -1
        if first < 0:
            return []
        batch, place = divmod(first, PLACES)
        counted, sequences = self._batches[batch]
        if place == NOT_KNOWN or not sequences:
            return list(sequences)
        return [sequences[place if counted is None else int(counted.nonzero()[place, 0])]]
