"""Orders and factorizes a gram matrix that stays in RAM, in one buffer of its size on the device.

The order is that of `factorization.py`, but for ties and the last bits: a Schur complement moves up within its buffer,
which keeps channels in their order instead of the order of their variance. The factorization is a right-looking one by
panels: a diagonal block is factorized, the rows below it are solved, and their square is subtracted from the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gram_matrix
from .factorization import DAMPING, ORDER_BLOCKS, not_factorized, with_damping
from .gram_matrix import GramInRam, spans
from .large_products import add_product, subtract_square

PANEL_CHANNELS = 512


def reverse_order_in_place(
    gram: GramInRam,
    buffer: Tensor,  # (in, in) fp32, contiguous, on the device: overwritten
    factors: Tensor | None,  # (in,): rows and columns of the matrix are multiplied by these
) -> Tensor:
    """Returns the channels, (in,) int64, in reverse rounding order; see `reverse_order`."""
    size, device = -(-len(gram) // ORDER_BLOCKS), buffer.device
    for span in spans(len(gram), gram_matrix.BLOCK_CHANNELS):
        buffer[span] = _multiplied_rows(gram.rows(span), None if factors is None else factors[span], factors)
    rest, unexplained = torch.arange(len(gram), device=device), buffer
    loudness = buffer.diagonal().clone()
    buffer.diagonal().add_(DAMPING * buffer.diagonal().mean())
    chosen, failures = [], torch.zeros((), dtype=torch.int32, device=device)
    while len(rest) > size:
        by_variance = torch.argsort(unexplained.diagonal(), stable=True)
        quiet, others = by_variance[:size], by_variance[size:].sort().values
        rows = unexplained.index_select(0, quiet)
        factor, failed = torch.linalg.cholesky_ex(rows.index_select(1, quiet))
        failures += failed
        explaining = torch.linalg.solve_triangular(factor, rows.index_select(1, others), upper=False)
        del rows
        chosen.append(rest[quiet])
        rest = rest[others]
        unexplained = _moved_up(unexplained, others, buffer)
        subtract_square(unexplained, explaining)
        del explaining
    chosen.append(rest[torch.argsort(unexplained.diagonal(), stable=True)])
    return torch.where(failures == 0, torch.cat(chosen), torch.argsort(loudness, stable=True))


def _moved_up(
    matrix: Tensor,  # (n, n), at the start of `buffer`
    channels: Tensor,  # (m,) int64, rising
    buffer: Tensor,
) -> Tensor:
    """Returns the rows and columns of these channels, (m, m), at the start of the buffer.

    What is read comes never before what is written: row i is taken from a row at i or later, and is shorter.
    """
    m = len(channels)
    there = buffer.view(-1)[: m * m].view(m, m)
    for span in spans(m, gram_matrix.BLOCK_CHANNELS):
        there[span] = matrix.index_select(0, channels[span]).index_select(1, channels)
    return there


def factor_in_place(
    gram: GramInRam,
    channels: Tensor,  # (in,) int64: the order of the matrix that is factorized
    buffer: Tensor,  # (in, in) fp32, contiguous, on the device: overwritten
    factors: Tensor | None,  # (in,): rows and columns of the matrix are multiplied by these
) -> tuple[Tensor, Tensor]:
    """Fills the buffer with the lower triangular factor of the damped matrix; returns it, and λ, ().

    Raises:
        NumericalError: the matrix could not be factorized even when strongly damped (it is not finite).
    """
    on_host = channels.cpu()
    for damping in with_damping():
        for span in spans(len(gram), gram_matrix.BLOCK_CHANNELS):
            rows = gram.rows_of(on_host[span]).index_select(1, channels)
            own = None if factors is None else factors[channels]
            buffer[span] = _multiplied_rows(rows, None if own is None else own[span], own)
        added = damping * buffer.diagonal().mean().clamp(min=torch.finfo(buffer.dtype).tiny)
        buffer.diagonal().add_(added)
        failures = _factorized(buffer)
        if bool((failures == 0) & torch.isfinite(buffer.diagonal()).all()):
            return buffer, added
    raise not_factorized(len(gram))


def _factorized(matrix: Tensor) -> Tensor:
    """Factorizes (n, n) in place, zeros above the diagonal included; returns how many panels failed, ()."""
    failures = torch.zeros((), dtype=torch.int32, device=matrix.device)
    for panel in spans(len(matrix), PANEL_CHANNELS):
        factor, failed = torch.linalg.cholesky_ex(matrix[panel, panel])
        failures += failed
        matrix[panel, panel] = factor
        matrix[panel, panel.stop :] = 0
        below = matrix[panel.stop :, panel]
        below.copy_(torch.linalg.solve_triangular(factor.t(), below, upper=True, left=False))
        for columns in spans(len(below), gram_matrix.BLOCK_CHANNELS):  # on and below the diagonal
            at = slice(panel.stop + columns.start, panel.stop + columns.stop)
            add_product(matrix[at.start :, at], below[columns.start :], below[columns].t(), alpha=-1)
    return failures


def reversed_in_place(matrix: Tensor) -> Tensor:
    """Turns (n, n), contiguous, backwards in both directions: its numbers in reverse order; returns it."""
    flat = matrix.view(-1)
    half = len(flat) // 2
    for span in spans(half, gram_matrix.BLOCK_CHANNELS * len(matrix)):
        first, last = flat[span], flat[len(flat) - span.stop : len(flat) - span.start]
        turned = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(turned)
    return matrix


def _multiplied_rows(
    rows: Tensor,  # (rows, in)
    own: Tensor | None,  # (rows,)
    factors: Tensor | None,  # (in,)
) -> Tensor:
    return rows if own is None or factors is None else rows.mul_(own[:, None]).mul_(factors)
