"""Memory that ordering channels and rounding take on an accelerator, in bytes, for who plans it.

Not counted: what goes in (the weight, its clipped ranges, the gram matrix, and the order when rounding), and what
libraries take inside a call (cuSOLVER, cuBLAS).
"""

from __future__ import annotations

from . import factorization_in_place, gram_matrix
from .chunks import ACCELERATOR_ELEMENTS, STACK_ELEMENTS
from .factorization import ORDER_BLOCKS
from .large_products import parts_bytes
from .refit import MOST_PRODUCT_ELEMENTS

FP32_BYTES = 4
SMALL_BYTES = 2**14
"""Numbers and vectors, each in a block of 512 bytes at least."""


def ordering_bytes(
    in_features: int,
    elements: int | None = None,  # as for `chunks_of_at_most`
) -> int:
    """Returns what `feedback_order` takes: two matrices, of which one is its result, and four blocks of channels or
    the parts of two."""
    block = -(-in_features // ORDER_BLOCKS)
    numbers = 2 * in_features**2 + 2 * block * in_features + 2 * block**2 + 16 * in_features
    others = in_features - block
    in_turn = max(FP32_BYTES * 2 * block * in_features, parts_bytes(others, block, others, elements))
    return FP32_BYTES * numbers + in_turn + SMALL_BYTES


def ordering_in_place_bytes(in_features: int) -> int:
    """Returns what `feedback_order` takes where the gram matrix stays in RAM: one matrix, and blocks of rows."""
    block = -(-in_features // ORDER_BLOCKS)
    in_turn = max(
        (3 * min(gram_matrix.BLOCK_CHANNELS, in_features) + block) * in_features,  # rows from RAM, or moving up
        (3 * block + factorization_in_place.PANEL_CHANNELS) * in_features,
    )
    return FP32_BYTES * (in_features**2 + in_turn + 2 * block**2 + 16 * in_features) + SMALL_BYTES


def rounding_bytes(
    out_features: int,  # rows of the stack
    in_features: int,
    group_size: int,
    elements: int | None = None,  # as for `chunks_of_at_most`
) -> int:
    """Returns what `round_weight` takes with error feedback, its result included."""
    groups = in_features // group_size

    def rows(of: int, usual: int, width: int) -> int:
        return min(of, max(1, (usual if elements is None else min(usual, elements)) // width))

    fed_back = rows(out_features, STACK_ELEMENTS, in_features)
    chunk = rows(fed_back, ACCELERATOR_ELEMENTS, in_features)
    fitted = rows(chunk, ACCELERATOR_ELEMENTS, groups**2)
    products = rows(groups, MOST_PRODUCT_ELEMENTS, fitted * in_features)
    setting_up = products * (in_features + group_size + groups)  # products, a copy of the codes, and sums
    half = in_features // 2
    between_halves, of_weights = (
        parts_bytes(*shape, elements) // FP32_BYTES
        for shape in ((half, half, fed_back), (fitted, in_features, in_features))
    )
    temporaries = max(
        fed_back * (3 * in_features + 4 * groups) + between_halves,  # w - ŵ, w' and the codes of the second time; grids
        fitted * (in_features + groups**2 + max(setting_up, 2 * groups**2) + 4 * groups) + of_weights,  # fitting scales
        3 * chunk * in_features,  # rounding to nearest
    )
    results = out_features * (in_features + 11 * groups + 8)
    return FP32_BYTES * (results + temporaries) + SMALL_BYTES
