"""Predicts the bytes that the scale search holds at most on an accelerator, beside weights, gram matrix and row errors.

    E elements at a time, in blocks of rows, or candidates × sampled rows:
    a loss on all rows      12 E    the rows in fp32, W·s, and its integers, which become D and are multiplied by G
    losses of candidates     8 E    W·s and its integers; the sampled rows are kept
    before error feedback   12 E    W·r of every candidate, its steps, and its zero points, one per channel

Each group of channels adds a few numbers. What rounding with error feedback needs comes on top of the last line.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .chunks import ACCELERATOR_ELEMENTS, at_once
from .scale import COARSE_STEP, FEEDBACK_STEPS_DOWN, FEEDBACK_STEPS_UP, SAMPLE_ROWS

FP32 = 4
GROUP_NUMBERS = 6
"""fp32 numbers per group of channels that are alive at once: its range, scale, least and largest integer, one more."""
ROW_NUMBERS = 6
"""fp32 numbers per row: sums, partly in fp64."""
MOST_CANDIDATES = 4 * COARSE_STEP - 4
"""Candidates that are ranked together: the neighbours of the best two of the coarse ones."""
FEEDBACK_CANDIDATES = FEEDBACK_STEPS_DOWN + FEEDBACK_STEPS_UP + 1
SPREAD = 4
"""Standard deviations by which the number of sampled rows may exceed its expectation."""


class GroupShape(NamedTuple):
    """Linears that share an input."""

    rows: int  # of all of them
    in_features: int
    group_size: int  # the smallest of their grids


def whole_loss_bytes(shape: GroupShape) -> int:
    """Returns the bytes of measuring one scale on all rows, or of the mean relative magnitudes of all weights."""
    rows = min(shape.rows, max(1, at_once(ACCELERATOR_ELEMENTS) // shape.in_features))
    return rows * (3 * FP32 * shape.in_features + _group_bytes(shape)) + FP32 * shape.rows


def sampled_loss_bytes(shape: GroupShape, n_grid: int) -> int:
    """Returns the bytes of ranking candidates for rounding to nearest, the sampled rows included."""
    rows = sampled_rows(shape)
    most_at_once = at_once(ACCELERATOR_ELEMENTS)
    candidates = max(
        1, min(max(-(-n_grid // COARSE_STEP), MOST_CANDIDATES), most_at_once // (rows * shape.in_features))
    )
    chunk = min(rows, max(1, most_at_once // shape.in_features))
    kept = rows * shape.in_features + 2 * n_grid * shape.in_features
    return candidates * chunk * (2 * FP32 * shape.in_features + _group_bytes(shape)) + FP32 * kept


def feedback_ranking_bytes(shape: GroupShape, n_grid: int) -> int:
    """Returns the bytes that the ranking by error feedback holds when it calls the rounding.

    Among them are the sampled rows and the factor, (in, in) fp32; what rounding needs itself is not.
    """
    rows = sampled_rows(shape)
    candidates = max(1, min(FEEDBACK_CANDIDATES, at_once(ACCELERATOR_ELEMENTS) // (rows * shape.in_features)))
    tensors = 3 if shape.group_size < shape.in_features else 2  # the zero points of a single group are not repeated
    rounded = candidates * rows * (tensors * FP32 * shape.in_features + _group_bytes(shape))
    return rounded + FP32 * shape.in_features**2 + ranking_kept_bytes(shape, n_grid)


def ranking_kept_bytes(shape: GroupShape, n_grid: int) -> int:
    """Returns the bytes of sampled rows, candidates and the reference, held while candidates are ranked by feedback."""
    return FP32 * 2 * shape.in_features * (sampled_rows(shape) + n_grid + 1)


def sampled_rows(shape: GroupShape) -> int:
    """Returns how many rows candidates are ranked on, at most (all but certainly)."""
    return min(shape.rows, SAMPLE_ROWS + SPREAD * math.isqrt(SAMPLE_ROWS))


def _group_bytes(shape: GroupShape) -> int:
    """Returns the bytes of what one row has per group of channels, and once."""
    return FP32 * (ROW_NUMBERS + GROUP_NUMBERS * (shape.in_features // shape.group_size))
