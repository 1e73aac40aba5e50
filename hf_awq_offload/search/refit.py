"""Fits the scales to given codes: least squares in closed form, per row.

A quantized row is Σ_g Δ_g q_g with q_g = codes - zero point in the channels of group g and zero elsewhere. With the
codes held fixed, its output error is quadratic in the Δ of its groups. On the damped matrix that error feedback uses:

    min_Δ (w - Δ Q)(G + λI)(w - Δ Q)ᵀ   ->   Δ (Q H Qᵀ) = w H Qᵀ,   H = G + λI,   Q = (q_1; …; q_n)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats.grid import Grid, GroupParameters, stored_scale
from . import gram_matrix
from .chunks import ACCELERATOR_ELEMENTS, at_once, row_chunks
from .gram_matrix import Gram, GramInRam, spans
from .large_products import product

MOST_SYSTEM_ELEMENTS = 2**24
"""Matrix elements of the equations that are solved at once: 64 MiB."""
MOST_PRODUCT_ELEMENTS = 2**25
"""Products of codes with the gram matrix that an accelerator holds at once: 128 MiB."""


def refitted(
    weight: Tensor,  # (out, in) fp32
    codes: Tensor,  # (out, in) integers
    parameters: GroupParameters,  # (out, n)
    gram: Gram,
    damping: Tensor,  # () fp32: λ
    grid: Grid,
) -> tuple[GroupParameters, Tensor]:
    """Returns storable new scales with the zero points unchanged, and the change of each row's error, (out,).

    The change is measured on G alone, without λ. A group whose best scale is not positive keeps its old scale, and so
    does a row whose equations have no solution.
    """
    scale, change = torch.empty_like(parameters.scale), torch.empty_like(weight[:, 0])
    for span in _spans(weight, parameters.scale.shape[1]):
        before = parameters.scale[span]
        centered = grid.groups(codes[span]) - parameters.zero[span, :, None]
        if isinstance(gram, GramInRam):
            matrix, right = _equations_from_ram(weight[span], centered, gram)
        else:
            equations = _equations if weight.device.type == "cpu" else _equations_in_blocks
            matrix, right = equations(weight[span], centered, gram)
        damped_right = right + damping * (grid.groups(weight[span]) * centered).sum(dim=-1)
        best = _solved(matrix, damping * centered.square().sum(dim=-1), damped_right)
        scale[span] = torch.where(best > 0, stored_scale(best, grid), before)
        step, middle = scale[span] - before, (scale[span] + before) / 2
        change[span] = 2 * (step * ((matrix @ middle[..., None]).squeeze(-1) - right)).sum(dim=1)
    return GroupParameters(scale, parameters.zero), change


def _spans(
    weight: Tensor,  # (out, in)
    groups: int,  # n
) -> Iterator[slice]:
    """Yields rows to work on at a time: on an accelerator, neither they nor their equations exceed a chunk."""
    for span in row_chunks(weight):
        rows = stop = min(span.stop, len(weight)) - span.start
        if weight.device.type != "cpu":
            rows = max(1, at_once(ACCELERATOR_ELEMENTS) // groups**2)
        for start in range(0, stop, rows):
            yield slice(span.start + start, span.start + min(stop, start + rows))


def _equations(
    weight: Tensor,  # (rows, in)
    centered: Tensor,  # (rows, n, group_size): codes - zero point
    gram: Tensor,  # (in, in)
) -> tuple[Tensor, Tensor]:
    """Returns Q G Qᵀ, (rows, n, n), and w G Qᵀ, (rows, n), for every row."""
    n, group_size = centered.shape[1:]
    matrix, right = weight.new_empty(len(weight), n, n), weight.new_empty(len(weight), n)
    for group in range(n):
        products = centered[:, group] @ gram[group * group_size : (group + 1) * group_size]
        right[:, group] = (products * weight).sum(dim=1)
        matrix[:, group] = products.unflatten(1, (n, group_size)).mul_(centered).sum(dim=-1)
    return matrix, right


def _equations_in_blocks(
    weight: Tensor,  # (rows, in)
    centered: Tensor,  # (rows, n, group_size): codes - zero point
    gram: Tensor,  # (in, in), symmetric
) -> tuple[Tensor, Tensor]:
    """Returns what `_equations` does, for accelerators: several groups at once, and half of the symmetric matrix.

    A CPU is faster without: its products stay in the cache, so it loses nothing by reading them twice.
    """
    rows, n, group_size = centered.shape
    matrix = weight.new_empty(rows, n, n)
    right = product(weight, gram).unflatten(1, (n, group_size)).mul_(centered).sum(dim=-1)
    groups = max(1, at_once(MOST_PRODUCT_ELEMENTS) // weight.numel())
    for start in range(0, n, groups):
        own = centered[:, start : start + groups].transpose(0, 1)  # (groups, rows, group_size)
        couplings = gram.unflatten(0, (n, group_size))[start : start + groups, :, start * group_size :]
        # No name holds the products, (groups, rows, n - start, group_size), while the next ones are computed.
        block = torch.bmm(own, couplings).unflatten(2, (n - start, -1)).mul_(centered[:, start:]).sum(dim=-1)
        matrix[:, start : start + groups, start:] = block.transpose(0, 1)
        matrix[:, start:, start : start + groups] = block.permute(1, 2, 0)
    return matrix, right


def _equations_from_ram(
    weight: Tensor,  # (rows, in)
    centered: Tensor,  # (rows, n, group_size): codes - zero point
    gram: GramInRam,
) -> tuple[Tensor, Tensor]:
    """Returns what `_equations` does, reading the gram matrix once: some groups at a time, or a part of a large one."""
    rows, n, group_size = centered.shape
    matrix, right = weight.new_zeros(rows, n, n), weight.new_zeros(rows, n)
    groups = max(1, at_once(MOST_PRODUCT_ELEMENTS) // weight.numel())
    most = min(gram_matrix.BLOCK_CHANNELS, groups * group_size)
    width = min(most, group_size)
    for group in spans(n, max(1, most // group_size)):
        for part in spans(group_size, width):
            first, last = group.start * group_size + part.start, (group.stop - 1) * group_size + part.stop
            couplings = gram.rows(slice(first, last))  # (groups · width, in)
            own = centered[:, group, part]  # (rows, groups, width)
            shape = own.shape[1:]
            right[:, group] += (weight @ couplings.t()).unflatten(1, shape).mul_(own).sum(dim=-1)
            products = torch.bmm(own.transpose(0, 1), couplings.unflatten(0, shape)).unflatten(2, (n, group_size))
            matrix[:, group] += products.mul_(centered).sum(dim=-1).transpose(0, 1)
            del couplings, products
    return matrix, right


def _solved(
    matrix: Tensor,  # (rows, n, n)
    diagonal: Tensor,  # (rows, n), added to the diagonals of `matrix`
    right: Tensor,  # (rows, n)
) -> Tensor:
    """Solves every row's system and returns the solutions, (rows, n); 0 where there is none."""
    rows = max(1, at_once(MOST_SYSTEM_ELEMENTS) // matrix[0].numel())
    solutions = []
    for part, added, side in zip(matrix.split(rows), diagonal.split(rows), right.split(rows), strict=True):
        factor, failed = torch.linalg.cholesky_ex(_with_diagonal(part, added))
        solution = torch.cholesky_solve(side[..., None], factor).squeeze(-1)
        solutions.append(torch.where(failed[:, None] == 0, solution, 0))
    return torch.cat(solutions)


def _with_diagonal(
    matrix: Tensor,  # (rows, n, n)
    added: Tensor,  # (rows, n)
) -> Tensor:
    """Returns the matrices with `added` on their diagonals, (rows, n, n)."""
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(added)
    return damped
