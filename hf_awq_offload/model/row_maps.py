"""Works out which producer row feeds which input channel from the inputs before and after the rows were scaled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 32
"""Distinct factors of one probe: 1.25 … 5, about 4.6 % apart. A row's index is decoded as digits in this base."""
RATIO_TOLERANCE = 1e-3
"""Largest relative deviation of a channel from an exact multiple; fp32 rounding mostly stays well below this …"""
ROUNDING_NOISE = 3e-6
"""… except where large terms cancel: a channel may deviate by this share of the root mean square of all channels …"""
LARGEST_TOLERANCE = 0.02
"""… but by no more than this share of itself, so that factors can be told apart."""
PARALLEL_TOLERANCE = 1e-9
"""Largest difference from 1 of the cosine of two parallel rows, rounded to fp32."""


def level_factors(device: torch.device) -> Tensor:
    """Returns the factor that stands for each digit, (LEVELS,) fp32."""
    return torch.logspace(0, 1, LEVELS, base=4.0, device=device) * 1.25


def row_subsets(rows: int) -> list[Tensor]:
    """Returns halves of a linear's rows, in case it computes two things: last, first, odd, even; (rows,) bool each."""
    row = torch.arange(rows)
    return [row >= rows // 2, row < rows // 2, row % 2 == 1, row % 2 == 0]


def factor_index(
    before: Tensor,  # (tokens, in)
    after: Tensor,  # (tokens, in)
    factors: Tensor,  # (LEVELS,)
) -> tuple[Tensor, Tensor]:
    """Returns the index of the factor that every channel was multiplied by, (in,) int64; -1 for all-zero channels.

    The second tensor, () bool, is False if a channel changed in any other way: not at all, by another factor, or
    differently between tokens; or if all channels are zero. It stays on the device, so that many are read at once.
    """
    energy = before.square().sum(dim=0)
    alive = energy > 0
    ratio = (before * after).sum(dim=0) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    residual = (after - ratio * before).norm(dim=0)
    index = (ratio.unsqueeze(1).log() - factors.log()).abs().nan_to_num(nan=torch.inf).argmin(dim=1)
    deviation = (ratio / factors[index] - 1).abs()
    noise = ROUNDING_NOISE * (energy.mean() / energy).sqrt()
    tolerance = (RATIO_TOLERANCE + noise).clamp(max=LARGEST_TOLERANCE)
    linear = (residual <= tolerance * after.norm(dim=0)) & (deviation <= tolerance)
    return torch.where(alive, index, -1), (linear | ~alive).all() & alive.any()


def complete_row_map(
    row_of_channel: Tensor,  # (in,) int64, negative where the probe saw only zeros
    rows: int,
) -> Tensor | None:
    """Fills in channels that were zero on the probe if row c feeds channel c for all others; otherwise returns None."""
    known = row_of_channel >= 0
    channels = torch.arange(row_of_channel.shape[0], device=row_of_channel.device)
    if bool((row_of_channel[known] >= rows).any()):
        return None
    if bool(known.all()):
        return row_of_channel
    identity = row_of_channel.shape[0] == rows and bool((row_of_channel == channels)[known].all())
    return channels if identity else None


def has_rows_of(
    x: Tensor,  # (n, in)
    other: Tensor,  # (tokens, in)
) -> bool:
    """Returns whether every row of `x` that is not zero is a positive multiple of a row of `other`."""
    rows = x[x.any(dim=-1)]
    if rows.shape[-1] != other.shape[-1] or not len(rows):
        return False
    rows, other = (nn.functional.normalize(value.cpu().double()) for value in (rows, other))
    cosines = rows @ other.t()
    return bool((cosines.amax(dim=1) > 1 - PARALLEL_TOLERANCE).all())
