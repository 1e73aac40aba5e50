"""Multiplies large fp32 matrices on a GPU's tensor cores, in three products of TF32.

TF32 keeps 10 of the 23 bits of an fp32 mantissa. What it drops is taken as a second number, lo = x - hi:

    x y  ≈  hi_x hi_y + hi_x lo_y + lo_x hi_y

What is missing, lo_x lo_y, is less than 2⁻²⁰ of the product, about what the sums in fp32 lose; TF32 alone is off by
2⁻¹⁰ (CUTLASS, example 27, and Ootomo and Yokota 2022, arXiv:2203.03341, do the same). The three are one product of
matrices with three times the inner dimension, so the sum is read and written once.

Splitting reads and writes its operands several times. It pays where both sides of the result are long: the error
feedback between halves, Schur complements, and a weight with its gram matrix. Products with one short side, such as the
losses of a chunk of rows, are bound by memory and stay in fp32 (tests/bench/accelerator_time.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..precision import tf32_products
from .chunks import ACCELERATOR_ELEMENTS, at_once
from .gram_matrix import spans

LEAST_SIDE = 2048
"""Rows and columns of a result from which on three products should be faster than one in fp32: an estimate."""
TILE = 8192
"""Rows and columns of the result that are computed at a time."""
PART_ELEMENTS = 2**25
"""fp32 numbers in the parts of both operands: 128 MiB. Where memory is short, products stay in fp32 and take none."""
TF32_BITS = -(1 << 13)
"""Mask of the bits of an fp32 number that TF32 keeps."""
FAST_TF32 = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities of A100, H100 and H200, B200 and B300: by their data sheets, TF32 without sparsity is 7 to 15
times as fast as fp32. On GeForce 30 and 40 (8.6, 8.9) both are as fast, on A10, A40, L4 and L40S TF32 twice as fast."""
FP32_BYTES = 4


def add_product(
    total: Tensor,  # (m, n) fp32
    left: Tensor,  # (m, k) fp32
    right: Tensor,  # (k, n) fp32
    alpha: float = 1,
) -> None:
    """Adds alpha · left @ right to `total` in place."""
    if _pays(len(total), total.shape[1], total.device):
        with tf32_products():
            add_in_three_products(total, left, right, alpha)
    else:
        total.addmm_(left, right, alpha=alpha)


def subtract_square(
    total: Tensor,  # (n, n) fp32, symmetric
    rows: Tensor,  # (k, n) fp32
) -> None:
    """Subtracts rowsᵀ rows from `total` in place. Large ones: tiles on and below the diagonal, which are mirrored."""
    if not _pays(len(total), total.shape[1], total.device):
        total.addmm_(rows.t(), rows, alpha=-1)
        return
    with tf32_products():
        for tile in spans(len(total), TILE):
            add_in_three_products(total[tile, : tile.stop], rows[:, tile].t(), rows[:, : tile.stop], -1)
            total[: tile.start, tile] = total[tile, : tile.start].t()


def product(
    left: Tensor,  # (m, k) fp32
    right: Tensor,  # (k, n) fp32
) -> Tensor:
    """Returns left @ right, (m, n)."""
    if not _pays(len(left), right.shape[1], left.device):
        return left @ right
    total = left.new_zeros(len(left), right.shape[1])
    add_product(total, left, right)
    return total


def add_in_three_products(
    total: Tensor,  # (m, n) fp32
    left: Tensor,  # (m, k) fp32
    right: Tensor,  # (k, n) fp32
    alpha: float = 1,
    add: Callable[..., object] = Tensor.addmm_,
) -> None:
    """Adds alpha · left @ right to `total` in place; `add` may keep no more than TF32's bits of its operands."""
    m, n = total.shape
    inner = inner_at_once(m, left.shape[1], n)
    for rows in spans(m, TILE):
        for columns in spans(n, TILE):
            for part in spans(left.shape[1], inner):
                _add_part(total[rows, columns], left[rows, part], right[part, columns], alpha, add)


def _add_part(
    total: Tensor, left: Tensor, right: Tensor, alpha: float, add: Callable[..., object]
) -> None:  # a function of its own: its tensors are gone before the next part's come
    lefts = left.new_empty(len(left), 3 * left.shape[1])
    rights = right.new_empty(3 * len(right), right.shape[1])
    high, high_again, low = lefts.chunk(3, dim=1)
    high_again.copy_(split(left, high, low))
    high, low, high_again = rights.chunk(3)
    high_again.copy_(split(right, high, low))
    add(total, lefts, rights, alpha=alpha)


def split(
    numbers: Tensor,  # fp32
    high: Tensor,  # of the same shape, filled: what TF32 keeps of them
    low: Tensor,  # of the same shape, filled: the rest
) -> Tensor:
    """Splits numbers into two that add up to them, and returns `high`."""
    torch.bitwise_and(numbers.view(torch.int32), TF32_BITS, out=high.view(torch.int32))
    torch.sub(numbers, high, out=low)
    return high


def parts_bytes(m: int, k: int, n: int, elements: int | None = None) -> int:
    """Returns what `add_product` takes for a product of (m, k) and (k, n); `elements` as for `chunks_of_at_most`."""
    if min(m, n) < LEAST_SIDE or (elements is not None and elements < ACCELERATOR_ELEMENTS):
        return 0
    return FP32_BYTES * 3 * inner_at_once(m, k, n) * (min(m, TILE) + min(n, TILE))


def inner_at_once(m: int, k: int, n: int) -> int:
    """Returns how much of the inner dimension k is multiplied at a time."""
    return min(k, PART_ELEMENTS // (3 * (min(m, TILE) + min(n, TILE))))


def _pays(m: int, n: int, device: torch.device) -> bool:
    """Whether to make a product in three parts: its result is large, on a device that does, and memory is not short."""
    is_large = min(m, n) >= LEAST_SIDE and at_once(ACCELERATOR_ELEMENTS) == ACCELERATOR_ELEMENTS
    return is_large and _has_fast_tf32(device)


@cache
def _has_fast_tf32(device: torch.device) -> bool:
    """Whether the device multiplies TF32 much more than three times as fast as fp32."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in FAST_TF32
