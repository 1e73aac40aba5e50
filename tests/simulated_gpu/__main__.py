"""`python -m simulated_gpu [--devices N] ARGUMENTS` does what `pytest ARGUMENTS` does, with N simulated GPUs (1)."""

from __future__ import annotations

import argparse
import sys

import simulated_gpu


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulated_gpu", add_help=False)
    parser.add_argument("--devices", type=int, default=1)
    own, rest = parser.parse_known_args()
    simulated_gpu.start(own.devices)

    import pytest

    from .plugin import SimulatedGpuPlugin

    return int(pytest.main(rest, plugins=[SimulatedGpuPlugin()]))


if __name__ == "__main__":
    sys.exit(main())
