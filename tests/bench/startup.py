"""Measures how long the command line takes to answer when nothing has to be computed: medians of processes.

    python tests/bench/startup.py [--runs 9]

Wall-clock and processor time of whole processes, the start of the interpreter included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "hf-awq-offload")
COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], 0),
    "hf-awq-offload --help": ([SCRIPT, "--help"], 0),
    "hf-awq-offload quantize --help": ([SCRIPT, "quantize", "--help"], 0),
    "python -m hf_awq_offload quantize --help": ([sys.executable, "-m", "hf_awq_offload", "quantize", "--help"], 0),
    "hf-awq-offload quantize a b --bit 4 (a mistake)": ([SCRIPT, "quantize", "a", "b", "--bit", "4"], 2),
    "import typer (a parser built on it starts with this)": ([sys.executable, "-c", "import typer"], 0),
    "import torch": ([sys.executable, "-c", "import torch"], 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs + 1):
        for name, (command, code) in COMMANDS.items():
            taken[name].append(once(command, code))
    for name, times in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[1:], strict=True))  # the first fills caches
        print(f"{wall:8.3f} s wall {cpu:8.3f} s processor   {name}")


def once(command: list[str], code: int) -> tuple[float, float]:
    before, start = os.times(), time.perf_counter()
    result = subprocess.run(command, capture_output=True, check=False)
    wall, after = time.perf_counter() - start, os.times()
    assert result.returncode == code, result.stderr
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


if __name__ == "__main__":
    main()
