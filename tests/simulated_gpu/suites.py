"""What runs on simulated GPUs: the tests of the simulation, and those of the product that a device could make fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """Arguments of pytest, and how many devices there are."""

    name: str
    devices: int
    arguments: tuple[str, ...]


INSIDE = "tests/simulated_gpu/inside"
SUITES = [
    Suite(
        "the simulation",
        2,
        tuple(f"{INSIDE}/test_simulated_{part}.py" for part in ("memory", "streams", "operators", "devices")),
    ),
    Suite("the product on one device", 1, (f"{INSIDE}/test_product_on_cuda.py",)),
    Suite("the product on two devices", 2, (f"{INSIDE}/test_product_on_cuda.py",)),
]
