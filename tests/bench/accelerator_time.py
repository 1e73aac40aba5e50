"""Estimates how long quantizing a decoder layer takes on an H100, from counts of operations and the rates below.

    python tests/bench/accelerator_time.py

Arithmetic alone: nothing is run, and no card has confirmed it. Reading the file is not part of it. A term is FLOP, or
bytes, divided by a rate; n is a linear's input channels, m its output channels:

    forward     2 · tokens · m · n in bf16, and the upper half of every gram matrix
    orders      n³ / 3 for factorizing a gram matrix, and its Schur complements, once to rank scales and once to round
    losses      5/8 of 2 · m · n² for each time that all rows are measured: without a scale, and with the best
    rounding    two passes of m · n² over the weights, which are read or written 18 times in each, and the kernels
    fitting     3 · m · n² for the equations of the scales, and their products once from memory and back
    launches    kernels and waits of the search, as counted on the simulated GPU (docs/gpu.md)

Schur complements, the products of rounding between halves, and those of weights with a gram matrix are made in three
products of TF32 where they are large (search/large_products.py). The first lines have all of them in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hf_awq_offload.search.chunks import ACCELERATOR_ELEMENTS
from hf_awq_offload.search.factorization import ORDER_BLOCKS
from hf_awq_offload.search.large_products import LEAST_SIDE, TILE, inner_at_once

TOKENS = 128 * 512
FP32_FLOPS, TF32_FLOPS, BF16_FLOPS, BYTES_PER_S = 50e12, 300e12, 400e12, 2.6e12
LAUNCH_S, WAIT_S, KERNEL_S = 5e-6, 20e-6, 20e-6
"""A launch, a wait of the host, and 128 channels of the error feedback kernel."""
KERNELS, WAITS = 6_400, 20
"""Of a layer's search, hidden 512: `tests/simulated_gpu/layer_counts.py`. Larger layers have some more."""
BLOCK_CHANNELS, FULL_PASSES, MEASURED, GROUP_SIZE = 128, 18, 2, 128
SPLIT_BYTES, SUM_BYTES = 28, 8
"""Read and written to split a number into parts for three products, and to add to a number of the result."""


class Input(NamedTuple):
    """Linears that share an input."""

    channels: int
    outputs: int

    @property
    def row_chunks(self) -> list[int]:
        """Rows that are rounded at a time."""
        most = ACCELERATOR_ELEMENTS // self.channels
        return [min(most, self.outputs - start) for start in range(0, self.outputs, most)]


MODELS: dict[str, tuple[int, Sequence[Input]]] = {
    "7B": (32, [Input(4096, 3 * 4096), Input(4096, 4096), Input(4096, 2 * 11008), Input(11008, 4096)]),
    "70B": (80, [Input(8192, 8192 + 2 * 1024), Input(8192, 8192), Input(8192, 2 * 28672), Input(28672, 8192)]),
}


def product_s(m: int, k: int, n: int, in_three: bool) -> float:
    """Returns the seconds of one product of (m, k) and (k, n), added to what is there."""
    in_fp32 = 2 * m * k * n / FP32_FLOPS
    if not in_three or min(m, n) < LEAST_SIDE:
        return in_fp32
    moved = SPLIT_BYTES * m * k * n * (1 / min(m, TILE) + 1 / min(n, TILE))
    moved += SUM_BYTES * m * n * -(-k // inner_at_once(m, k, n))
    return 6 * m * k * n / TF32_FLOPS + moved / BYTES_PER_S


def ordering_s(channels: int, in_three: bool) -> float:
    """Returns the seconds of ordering and factorizing one gram matrix."""
    block = -(-channels // ORDER_BLOCKS)
    seconds = channels**3 / 3 / FP32_FLOPS
    for rest in range(channels - block, 0, -block):
        whole = product_s(rest, block, rest, in_three)
        tiles = -(-rest // TILE) if in_three and rest >= LEAST_SIDE else 1
        seconds += whole * (tiles + 1) / (2 * tiles)  # those on and below the diagonal
    return seconds


def between_halves_s(each: Input, in_three: bool) -> float:
    """Returns the seconds of the products of one pass with error feedback."""
    seconds = 0.0
    for rows in each.row_chunks:
        half, halves = each.channels // 2, 1
        while half >= BLOCK_CHANNELS // 2:
            seconds += halves * product_s(half, half, rows, in_three)
            half, halves = half // 2, 2 * halves
    return seconds


def seconds(inputs: Sequence[Input], in_three: bool) -> dict[str, float]:
    """Returns the seconds of each step for one decoder layer."""
    weights = sum(each.channels * each.outputs for each in inputs)
    products = sum(each.outputs * each.channels**2 for each in inputs)
    grams = sum(each.channels**2 for each in inputs)
    kernels = sum(2 * each.channels / BLOCK_CHANNELS for each in inputs)
    fitted_bytes = 4 * sum(each.outputs * each.channels**2 / GROUP_SIZE / 2 for each in inputs)
    with_gram = sum(product_s(rows, x.channels, x.channels, in_three) for x in inputs for rows in x.row_chunks)
    halves = sum(between_halves_s(each, in_three) for each in inputs)
    return {
        "forward": (2 * TOKENS * weights + TOKENS * grams) / BF16_FLOPS,
        "orders": 2 * sum(ordering_s(each.channels, in_three) for each in inputs),
        "losses": MEASURED * 1.25 * products / FP32_FLOPS,
        "rounding": 2 * (halves + 4 * FULL_PASSES * weights / BYTES_PER_S) + kernels * KERNEL_S,
        "fitting": with_gram + products / FP32_FLOPS + 2 * fitted_bytes / BYTES_PER_S,
        "launches": KERNELS * LAUNCH_S + WAITS * WAIT_S,
    }


if __name__ == "__main__":
    steps = list(seconds(MODELS["7B"][1], in_three=True))
    print(f"| model | {' | '.join(f'{step}, s' for step in steps)} | layer, s | all layers, s |")
    print(f"|---|{'---|' * (len(steps) + 2)}")
    for in_three in (False, True):
        for name, (layers, inputs) in MODELS.items():
            found = seconds(inputs, in_three)
            parts = " | ".join(f"{found[step]:.2f}" for step in steps)
            total, how = sum(found.values()), "three TF32" if in_three else "fp32"
            print(f"| {name}, {layers} layers, {how} | {parts} | {total:.2f} | {layers * total:.0f} |")
