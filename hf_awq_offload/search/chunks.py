"""How many weights the search works on at a time: this bounds the temporaries of every step.

A CPU wants chunks that stay in its cache, an accelerator few large kernels, as far as its memory allows. Who knows the
memory says so by `chunks_of_at_most`. Rows are independent of each other, so chunks change no more than the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

CACHED_ELEMENTS = 2**19
"""Weights processed at a time on a CPU: temporaries of 2 MiB stay in its cache (3.4 times faster, docs/log.md)."""
CACHED_ROWS = 256
"""Least rows per chunk on a CPU: with fewer, reading the gram matrix takes longer than the products."""
ACCELERATOR_ELEMENTS = 2**24
"""Weights processed at a time on an accelerator, which prefers few large kernels: 64 MiB for each fp32 temporary."""

STACK_ELEMENTS = 2**26
"""Weights, of one linear or several, that are rounded together: 256 MiB for each fp32 temporary."""

_most: ContextVar[int | None] = ContextVar("most_elements", default=None)


@contextmanager
def chunks_of_at_most(elements: int | None) -> Iterator[None]:
    """Bounds the weights that the search works on at a time inside the context; None leaves the usual sizes."""
    token = _most.set(elements)
    try:
        yield
    finally:
        _most.reset(token)


_in_ram: ContextVar[bool] = ContextVar("grams_in_ram", default=False)


@contextmanager
def grams_left_in_ram(are_left: bool) -> Iterator[None]:
    """Says whether gram matrices that are in RAM stay there while an accelerator searches (gram_matrix.py)."""
    token = _in_ram.set(are_left)
    try:
        yield
    finally:
        _in_ram.reset(token)


def grams_stay_in_ram() -> bool:
    return _in_ram.get()


def at_once(usual: int) -> int:
    """Returns how many weights to work on at a time where `usual` is best: fewer if memory is short."""
    most = _most.get()
    return usual if most is None else min(usual, most)


def row_chunks(
    weight: Tensor,  # (out, in)
) -> Iterator[slice]:
    """Yields spans of rows to process `weight` in, so that temporaries stay small."""
    if weight.device.type == "cpu":
        rows = max(CACHED_ROWS, CACHED_ELEMENTS // weight.shape[1])
    else:
        rows = ACCELERATOR_ELEMENTS // weight.shape[1]
    rows = max(1, min(rows, at_once(rows * weight.shape[1]) // weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)
