"""Three products of TF32 are as good as one in fp32, and only large ones on a GPU are made that way."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from hf_awq_offload.precision import ieee_products
from hf_awq_offload.search import large_products
from hf_awq_offload.search.chunks import chunks_of_at_most
from hf_awq_offload.search.large_products import add_in_three_products, add_product, split

MATMUL = torch.backends.cuda.matmul


def in_tf32(numbers: Tensor, rounded: bool) -> Tensor:
    """Returns what matrix units keep of fp32 numbers: 10 bits of the mantissa, the others dropped or rounded."""
    bits = numbers.contiguous().view(torch.int32) + (1 << 12 if rounded else 0)
    return (bits & -(1 << 13)).view(torch.float32)


def operands(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a sum, (70, 50), and factors, (70, 300) and (300, 50)."""
    generator = torch.Generator().manual_seed(0)
    total, left, right = (torch.randn(*shape, generator=generator) for shape in ((70, 50), (70, 300), (300, 50)))
    if kind == "positive":  # errors that all have one sign would add up
        total, left, right = total.abs(), left.abs(), right.abs()
    elif kind == "wide range":
        left *= torch.exp(4 * torch.randn(300, generator=generator))
    return total, left, right


@pytest.mark.parametrize("rounded", [False, True], ids=["units that cut", "units that round"])
@pytest.mark.parametrize("kind", ["random", "positive", "wide range"])
def test_the_error_is_that_of_fp32_and_far_below_that_of_tf32(kind, rounded):
    def add(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
        return total.addmm_(in_tf32(left, rounded), in_tf32(right, rounded), alpha=alpha)

    total, left, right = operands(kind)
    exact = total.double().addmm(left.double(), right.double(), alpha=-0.5)
    scale = total.double().abs().addmm(left.double().abs(), right.double().abs())

    def error(found: Tensor) -> float:
        return float(((found - exact) / scale).square().mean().sqrt())

    in_fp32, in_one = total.clone().addmm_(left, right, alpha=-0.5), add(total.clone(), left, right, -0.5)
    in_three = total.clone()
    add_in_three_products(in_three, left, right, -0.5, add)
    assert error(in_three) < 6 * max(error(in_fp32), 2**-24)
    assert error(in_one) > 100 * error(in_three)


def test_integers_and_powers_of_two_are_exact():
    left, right = torch.arange(-600, 600.0).view(40, 30), torch.full((30, 20), 2.0**-30)
    total = torch.zeros(40, 20)
    add_in_three_products(total, left, right)
    assert torch.equal(total, left @ right)
    high, low = torch.empty_like(left), torch.empty_like(left)
    assert torch.equal(split(left, high, low), left)
    assert not low.any()


@pytest.mark.parametrize("shape", [(7, 5, 3), (64, 1, 9), (3, 100, 70)], ids=str)
def test_tiles_of_any_size_cover_the_product_once(shape, monkeypatch):
    monkeypatch.setattr(large_products, "TILE", 4)
    monkeypatch.setattr(large_products, "PART_ELEMENTS", 60)
    m, k, n = shape
    left, right = torch.randn(k, m).t(), torch.randn(k, n)
    total, expected = torch.ones(m, n), torch.ones(m, n).addmm_(left, right, alpha=2)
    add_in_three_products(total, left, right, 2)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_a_square_is_subtracted_tile_by_tile_and_mirrored(monkeypatch):
    monkeypatch.setattr(large_products, "_has_fast_tf32", lambda device: True)
    monkeypatch.setattr(large_products, "LEAST_SIDE", 8)
    monkeypatch.setattr(large_products, "TILE", 4)
    rows, total = torch.randn(5, 18), torch.randn(18, 18)
    total += total.t().clone()
    expected = total - rows.t() @ rows
    large_products.subtract_square(total, rows)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device_has_fast_tf32", "most", "is_split"), [(False, None, False), (True, None, True), (True, 2**20, False)]
)
def test_only_large_products_of_a_gpu_with_room_are_split(device_has_fast_tf32, most, is_split, monkeypatch):
    """On a CPU, nothing ever is: what is asked here is what the decision depends on."""
    seen: list[str] = []
    monkeypatch.setattr(large_products, "_has_fast_tf32", lambda device: device_has_fast_tf32)
    monkeypatch.setattr(large_products, "add_in_three_products", lambda *operands: seen.append(MATMUL.fp32_precision))
    monkeypatch.setattr(large_products, "LEAST_SIDE", 8)
    total, small = torch.zeros(8, 8), torch.zeros(7, 8)
    with ieee_products(), chunks_of_at_most(most):
        add_product(total, torch.ones(8, 3), torch.ones(3, 8))
        add_product(small, torch.ones(7, 3), torch.ones(3, 8))
        assert MATMUL.fp32_precision == "ieee"
    assert seen == (["tf32"] if is_split else [])
    assert bool((total == (0 if is_split else 3)).all())
    assert bool((small == 3).all())


def test_a_cpu_has_no_tf32():
    assert not large_products._has_fast_tf32(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "is_fast"), [((7, 5), False), ((8, 0), True), ((8, 6), False), ((8, 9), False), ((9, 0), True)]
)
def test_cards_whose_tf32_is_as_slow_as_fp32_do_without(capability, is_fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert large_products._has_fast_tf32.__wrapped__(torch.device("cuda", 0)) == is_fast


def test_only_the_parts_of_one_product_are_held(monkeypatch):
    monkeypatch.setattr(large_products, "TILE", 64)
    monkeypatch.setattr(large_products, "PART_ELEMENTS", 3 * 128 * 32)
    left, right, held = torch.randn(64, 320), torch.randn(320, 64), []

    def add(total: Tensor, lefts: Tensor, rights: Tensor, alpha: float) -> None:
        alive = [one() for one in held if one() is not None]
        assert not alive, "parts of the product before"
        held.extend((weakref.ref(lefts), weakref.ref(rights)))
        assert lefts.nbytes + rights.nbytes <= large_products.parts_bytes(4096, 320, 4096)
        total.addmm_(lefts, rights, alpha=alpha)

    total = torch.zeros(64, 64)
    add_in_three_products(total, left, right, 1, add)
    assert len(held) == 20
    torch.testing.assert_close(total, left @ right, rtol=1e-4, atol=1e-4)
