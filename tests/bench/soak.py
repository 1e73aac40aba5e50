"""Quantizes the shipped model 200 times in one process, and asserts that nothing grows.

    python tests/bench/soak.py [--runs 200]

In memory, streamed, failing, interrupted, loaded and saved take turns. Prints what the process holds every tenth of the
way, then the slope of each figure over the second half. Exit code 1 if a slope is above its limit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from soaking import KINDS, Counts, one
from transformers.utils import logging

import hf_awq_offload

SOURCE = Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama"
LIMITS = {"rss_kib": 16.0, "files": 0.02, "threads": 0.02, "mappings": 0.1, "scratch": 0.0, "tensors": 0.02}
"""Most growth per run. 16 KiB in each of 1000 runs would be 16 MiB, less than one copy of the model."""


def slope(values: list[float]) -> float:
    """Returns the least-squares growth per run."""
    mean_x, mean_y = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values))
    return above / sum((x - mean_x) ** 2 for x in range(len(values)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    counts: list[Counts] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        tempfile.tempdir = scratch
        print(f"{'runs':>5} " + " ".join(f"{name:>9}" for name in LIMITS) + "   seconds", flush=True)
        for index in range(runs):
            counts.append(one(index, SOURCE))
            if (index + 1) % max(1, runs // 10) == 0 or index < len(KINDS):
                figures = " ".join(f"{value:9,}" for value in asdict(counts[-1]).values())
                print(f"{index + 1:5} {figures} {time.perf_counter() - start:9.0f}", flush=True)
        tempfile.tempdir = None
    # The kinds differ in what they leave until the next one: whole rounds are compared.
    second_half = counts[(runs // 2) // len(KINDS) * len(KINDS) :]
    grew = []
    for name, limit in LIMITS.items():
        per_run = slope([float(getattr(count, name)) for count in second_half])
        print(f"{name:>9}: {per_run:+.3f} per run over the last {len(second_half)} (at most {limit:g})")
        if per_run > limit:
            grew.append(name)
    print(f"grew: {', '.join(grew) or 'nothing'}")
    return bool(grew)


if __name__ == "__main__":
    sys.exit(main())
