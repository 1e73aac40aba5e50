"""Takes the inputs of those tokens that enter the statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..transfers import sent


class CountedRows:
    """Selects the counted tokens of one batch. What the mask says is sent to a device once, not for each linear.

    Args:
        counted: (batch, tokens) bool on the CPU; None means all.
    """

    def __init__(self, counted: Tensor | None):
        self._tokens = None if counted is None else counted.numel()
        self._places = None if counted is None else counted.reshape(-1).nonzero().squeeze(1)
        self._places_on: dict[torch.device, Tensor] = {}

    def of(
        self,
        x: Tensor,  # (..., in)
    ) -> Tensor:
        """Returns the inputs of the counted tokens, (tokens, in); all inputs if they are not one row per token."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._places is None or rows.shape[0] != self._tokens:
            return rows
        if rows.device not in self._places_on:
            self._places_on[rows.device] = sent(self._places, rows.device)
        return rows.index_select(0, self._places_on[rows.device])
