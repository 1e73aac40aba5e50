"""Defines the sufficient statistics of a linear's input.

For a weight W (out, in) and inputs X (tokens, in), the mean squared output error of any replacement Ŵ needs X only
through its gram matrix (docs/design/001-sufficient-statistics.md):

    ‖X (Ŵ - W)ᵀ‖² / tokens = tr( D G Dᵀ ),   D = Ŵ - W,   G = XᵀX / tokens

One forward pass collects G; the scale search, clip search and rounding need no activations after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .chunks import grams_stay_in_ram
from .gram_matrix import Gram, GramInRam


@dataclass(frozen=True)
class InputStatistics:
    """Second moments and mean magnitudes of one linear input over all counted calibration tokens."""

    gram: Gram  # XᵀX / tokens
    mean_abs: Tensor  # (in,) fp32, mean |X| per channel
    tokens: int

    def divided(
        self,
        scale: Tensor,  # (in,)
    ) -> InputStatistics:
        """Returns the statistics of X / scale: the input once `scale` has been folded into the producer of X."""
        if isinstance(self.gram, GramInRam):
            return InputStatistics(replace(self.gram, scale=scale), self.mean_abs / scale, self.tokens)
        divisors = torch.outer(scale, scale)
        return InputStatistics(torch.div(self.gram, divisors, out=divisors), self.mean_abs / scale, self.tokens)

    def to(self, device: torch.device) -> InputStatistics:
        """Returns these statistics on `device`; a gram matrix in RAM stays there if the search is to leave it."""
        gram = _matrix(self)
        if gram.device != device and grams_stay_in_ram():
            return InputStatistics(GramInRam(gram, device), self.mean_abs.to(device), self.tokens)
        return InputStatistics(gram.to(device), self.mean_abs.to(device), self.tokens)


def pooled(statistics: Sequence[InputStatistics]) -> InputStatistics:
    """Combines the statistics of several inputs of equal width over all their tokens; `statistics` is not empty."""
    tokens = sum(part.tokens for part in statistics)
    gram, mean_abs = torch.zeros_like(_matrix(statistics[0])), torch.zeros_like(statistics[0].mean_abs)
    for part in statistics:
        gram += _matrix(part) * (part.tokens / max(tokens, 1))
        mean_abs += part.mean_abs * (part.tokens / max(tokens, 1))
    return InputStatistics(gram, mean_abs, tokens)


def blended(own: InputStatistics, pool: InputStatistics, min_tokens: int) -> InputStatistics:
    """Returns `own`, topped up from `pool` to `min_tokens` tokens where it has fewer."""
    if own.tokens >= min_tokens:
        return own
    share = own.tokens / min_tokens
    gram = _matrix(own) * share + _matrix(pool) * (1 - share)
    return InputStatistics(gram, own.mean_abs * share + pool.mean_abs * (1 - share), min_tokens)


def _matrix(statistics: InputStatistics) -> Tensor:
    """Returns the gram matrix of statistics that are not on their way through a search."""
    assert isinstance(statistics.gram, Tensor)
    return statistics.gram
