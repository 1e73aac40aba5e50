"""Says over how many devices a server can split a quantized model (tensor parallelism). Pure functions of shapes.

A server splits some linears by output channels (q, k, v, gate, up) and, where the outputs are summed up, by input
channels (o, down). A device then holds whole words of packed channels and whole groups: with N devices,

    out_features % (N · channels per word) == 0    and    (in_features / group_size) % N == 0

A down_proj of 29568 input channels has 231 groups of 128: an odd number, so no two devices can share it. With groups
of 64 it has 462, with groups of 32 924.

Which linears are split in which way only a server knows, so all of them have to allow both. One group per row
(group_size -1) is no obstacle to splitting the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

DEGREES = (2, 4, 8)
"""Numbers of devices that servers are run on."""
SMALLER_GROUPS = (64, 32)
"""Group sizes that servers have fast kernels for, and that may be proposed."""


class Shape(NamedTuple):
    """A quantized linear, as far as it matters here."""

    name: str
    in_features: int
    out_features: int
    group_size: int  # as configured, -1 allowed


def allows(linear: Shape, devices: int, per_word: int) -> bool:
    """Whether a linear can be split over so many devices, by either side; `per_word` output channels share a word."""
    units = linear.in_features if linear.group_size == -1 else linear.in_features // linear.group_size
    return units % devices == 0 and linear.out_features % (devices * per_word) == 0


def parallel_degrees(linears: Iterable[Shape], per_word: int) -> tuple[int, ...]:
    """Those of DEGREES over which every linear can be split."""
    linears = list(linears)
    return tuple(degree for degree in DEGREES if all(allows(linear, degree, per_word) for linear in linears))


def advice(linears: Sequence[Shape], per_word: int) -> str | None:
    """Says which degrees are possible and which group size would allow more; None if all DEGREES are possible.

    Args:
        linears: every quantized linear.
        per_word: output channels that share a word: 8 in AWQ, 1 in pack-quantized, which packs input channels.
    """
    degrees = parallel_degrees(linears, per_word)
    refused = [degree for degree in DEGREES if degree not in degrees]
    if not refused:
        return None
    can = f"can split this model over {_listed(degrees)} devices, not" if degrees else "can't split this model"
    first = next(linear for linear in linears if not allows(linear, refused[0], per_word))
    text = (
        f"Tensor parallelism: servers {can} over {_listed(refused)}, since {_described(first, refused[0], per_word)}."
    )
    better = {size: _with_groups_of(size, linears, per_word) for size in SMALLER_GROUPS}
    size = max(better, key=lambda size: len(better[size]))  # of equals, the larger groups
    if len(better[size]) > len(degrees):
        text += f" With group_size={size} they could split it over {_listed(better[size])}."
    return text


def _described(linear: Shape, devices: int, per_word: int) -> str:
    """What keeps a linear from being split."""
    if linear.out_features % (devices * per_word):
        words = "" if per_word == 1 else f", in words of {per_word}"
        return f"{linear.name} has {linear.out_features} output channels{words}"
    if linear.group_size == -1:
        return f"{linear.name} has {linear.in_features} input channels"
    return f"{linear.name} has {linear.in_features // linear.group_size} groups of {linear.group_size} input channels"


def _with_groups_of(size: int, linears: Sequence[Shape], per_word: int) -> tuple[int, ...]:
    """The degrees that would be possible with groups of at most `size`; none if it divides not all linears."""
    if all(0 < linear.group_size <= size for linear in linears):
        return ()
    smaller = [linear._replace(group_size=size) if linear.group_size > size else linear for linear in linears]
    if any(linear.group_size > 0 and linear.in_features % linear.group_size for linear in smaller):
        return ()
    return parallel_degrees(smaller, per_word)


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
