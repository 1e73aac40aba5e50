"""Estimates how long quantizing a decoder layer takes on an H100, from counts of operations and the rates below.

    python tests/bench/accelerator_time.py

Arithmetic alone: nothing is run, and no card has confirmed it. Reading the file is not part of it. A term is FLOP, or
bytes, divided by a rate; n is a linear's input channels, m its output channels:

    forward     2 · tokens · m · n in bf16, and the upper half of every gram matrix
    orders      n³ for ordering and factorizing a gram matrix, once to rank scales and once to round
    losses      5/8 of 2 · m · n² for each time that all rows are measured: without a scale, and with the best
    rounding    two passes of m · n² over the weights, which are read or written 18 times in each, and the kernels
    fitting     3 · m · n² for the equations of the scales, and their products once from memory and back
    launches    kernels and waits of the search, as counted on the simulated GPU (docs/gpu.md)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TOKENS = 128 * 512
FP32_FLOPS, BF16_FLOPS, BYTES_PER_S = 50e12, 400e12, 2.6e12
LAUNCH_S, WAIT_S, KERNEL_S = 5e-6, 20e-6, 20e-6
"""A launch, a wait of the host, and 128 channels of the error feedback kernel."""
KERNELS, WAITS = 6_400, 20
"""Of a layer's search, hidden 512: `tests/simulated_gpu/layer_counts.py`. Larger layers have some more."""
BLOCK_CHANNELS, FULL_PASSES, MEASURED, GROUP_SIZE = 128, 18, 2, 128


class Input(NamedTuple):
    """Linears that share an input."""

    channels: int
    outputs: int


MODELS: dict[str, tuple[int, Sequence[Input]]] = {
    "7B": (32, [Input(4096, 3 * 4096), Input(4096, 4096), Input(4096, 2 * 11008), Input(11008, 4096)]),
    "70B": (80, [Input(8192, 8192 + 2 * 1024), Input(8192, 8192), Input(8192, 2 * 28672), Input(28672, 8192)]),
}


def seconds(inputs: Sequence[Input]) -> dict[str, float]:
    """Returns the seconds of each step for one decoder layer."""
    weights = sum(each.channels * each.outputs for each in inputs)
    products = sum(each.outputs * each.channels**2 for each in inputs)
    grams = sum(each.channels**2 for each in inputs)
    kernels = sum(2 * each.channels / BLOCK_CHANNELS for each in inputs)
    fitted_bytes = 4 * sum(each.outputs * each.channels**2 / GROUP_SIZE / 2 for each in inputs)
    return {
        "forward": (2 * TOKENS * weights + TOKENS * grams) / BF16_FLOPS,
        "orders": 2 * sum(each.channels**3 for each in inputs) / FP32_FLOPS,
        "losses": MEASURED * 1.25 * products / FP32_FLOPS,
        "rounding": 2 * (products / FP32_FLOPS + 4 * FULL_PASSES * weights / BYTES_PER_S) + kernels * KERNEL_S,
        "fitting": 3 * products / FP32_FLOPS + 2 * fitted_bytes / BYTES_PER_S,
        "launches": KERNELS * LAUNCH_S + WAITS * WAIT_S,
    }


if __name__ == "__main__":
    steps = list(seconds(MODELS["7B"][1]))
    print(f"| model | {' | '.join(f'{step}, s' for step in steps)} | layer, s | all layers, s |")
    print(f"|---|{'---|' * (len(steps) + 2)}")
    for name, (layers, inputs) in MODELS.items():
        found = seconds(inputs)
        parts = " | ".join(f"{found[step]:.2f}" for step in steps)
        print(f"| {name}, {layers} layers | {parts} | {sum(found.values()):.2f} | {layers * sum(found.values()):.0f} |")
