"""Orders the channels of a gram matrix and factorizes it, in two buffers of its size.

A matrix of 28,672 channels takes 3.3 GB, so neither step may copy it at will. On a GPU, the steps never wait: whether a
block could be factorized is asked once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NumericalError
from .large_products import subtract_square

DAMPING = 0.01
"""λ relative to the mean of G's diagonal; it is multiplied by ten until the factorization succeeds."""
LARGEST_DAMPING = 1e3
ORDER_BLOCKS = 32
"""Number of blocks in which channels are ordered; ordering them one by one would read the matrix once per channel."""


def reverse_order(
    gram: Tensor,  # (in, in) fp32
    here: Tensor,  # (in, in) fp32, contiguous: overwritten
    there: Tensor,  # (in, in) fp32, contiguous: overwritten
    factors: Tensor | None = None,  # (in,): rows and columns of the matrix are multiplied by these
) -> Tensor:
    """Returns the channels, (in,) int64, in reverse rounding order.

    They are chosen in blocks: those that have the least variance given the channels before them. If a block cannot be
    factorized, all channels are ordered by G_ii.
    """
    size = -(-len(gram) // ORDER_BLOCKS)
    rest = torch.arange(len(gram), device=gram.device)
    unexplained = multiplied(here.copy_(gram), factors)  # the Schur complement: covariance given those in `chosen`
    loudness = unexplained.diagonal().clone()
    unexplained.diagonal().add_(DAMPING * unexplained.diagonal().mean())
    chosen, failures = [], torch.zeros((), dtype=torch.int32, device=gram.device)
    while len(rest) > size:
        by_variance = torch.argsort(unexplained.diagonal(), stable=True)
        quiet, others = by_variance[:size], by_variance[size:]
        rows = unexplained.index_select(0, quiet)
        factor, failed = torch.linalg.cholesky_ex(rows.index_select(1, quiet))
        failures += failed
        explaining = torch.linalg.solve_triangular(factor, rows.index_select(1, others), upper=False)
        chosen.append(rest[quiet])
        rest = rest[others]
        remaining = there.view(-1)[: len(rest) ** 2].view(len(rest), len(rest))
        unexplained = reordered(unexplained, others, remaining)
        subtract_square(unexplained, explaining)
        here, there = there, here
    chosen.append(rest[torch.argsort(unexplained.diagonal(), stable=True)])
    by_loudness = torch.argsort(loudness, stable=True)
    return torch.where(failures == 0, torch.cat(chosen), by_loudness)


def multiplied(
    matrix: Tensor,  # (n, n)
    factors: Tensor | None,  # (n,)
) -> Tensor:
    """Multiplies rows and columns by `factors` in place, and returns the matrix."""
    return matrix if factors is None else matrix.mul_(factors[:, None]).mul_(factors)


def reordered(
    matrix: Tensor,  # (n, n)
    channels: Tensor,  # (m,) int64
    out: Tensor,  # (m, m), contiguous
) -> Tensor:
    """Fills `out` with the rows and columns of these channels, and returns it."""
    if matrix.device.type != "cpu":  # one kernel
        torch.ops.aten.index.Tensor_out(matrix, [channels[:, None], channels], out=out)
        return out
    size = -(-len(matrix) // ORDER_BLOCKS)  # by parts that stay in the cache: six times faster
    for part, rows in zip(channels.split(size), out.split(size), strict=True):
        torch.index_select(matrix.index_select(0, part), 1, channels, out=rows)
    return out


def damped_factor(
    matrix: Tensor,  # (in, in) fp32, contiguous; its diagonal is damped afterwards
    out: Tensor,  # (in, in) fp32, contiguous: holds the factor's columns afterwards
) -> tuple[Tensor, Tensor]:
    """Returns lower triangular L, (in, in), with L Lᵀ = G + λI, and λ, (). The host waits once for each λ.

    Raises:
        NumericalError: the matrix could not be factorized even when strongly damped (it is not finite).
    """
    mean = matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    diagonal = matrix.diagonal().clone()
    lower, failed = out.t(), torch.empty((), dtype=torch.int32, device=matrix.device)
    for damping in with_damping():
        torch.add(diagonal, damping * mean, out=matrix.diagonal())
        torch.linalg.cholesky_ex(matrix, out=(lower, failed))
        if bool((failed == 0) & torch.isfinite(lower.diagonal()).all()):
            return lower, damping * mean
    raise not_factorized(len(matrix))


def with_damping() -> Iterator[float]:
    """Yields what to try for λ, relative to the mean of the diagonal."""
    damping = DAMPING
    while damping <= LARGEST_DAMPING:
        yield damping
        damping *= 10


def not_factorized(channels: int) -> NumericalError:
    """Returns the error of a gram matrix that no damping makes positive."""
    return NumericalError(
        f"A gram matrix of {channels} channels could not be factorized even with damping {LARGEST_DAMPING:g}; "
        "expected finite calibration activations. Use other calibration data, or rounding='nearest'."
    )


def reversed_in(
    lower: Tensor,  # (in, in), with contiguous columns
    out: Tensor,  # (in, in), contiguous
) -> Tensor:
    """Fills `out` with `lower` backwards in both directions, which is an upper triangular matrix, and returns it."""
    if lower.device.type != "cpu":
        return reordered(lower, torch.arange(len(lower) - 1, -1, -1, device=lower.device), out)
    size = -(-len(lower) // ORDER_BLOCKS)
    for start in range(0, len(lower), size):
        rows = out[start : start + size]
        rows.copy_(lower[len(lower) - start - len(rows) : len(lower) - start].flip((0, 1)))
    return out
