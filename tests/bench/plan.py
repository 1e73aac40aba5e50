"""Compares what `plan` predicts with what `quantize` then takes, on several shapes.

    python tests/bench/plan.py [--cpu-time]

Peak resident memory above that of the process before, the most that lay on the disk, and seconds. Both in processes of
their own; random weights. With --cpu-time the planner's clock and ours count processor time: for a machine that others
use, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from made import make_checkpoint, measured

MIB = 2**20
SHAPES = {
    "hidden 512, 8 layers, 32 x 256 tokens": (8, {"hidden_size": 512, "intermediate_size": 1408}, 32, 256),
    "hidden 1024, 8 layers, 16 x 128 tokens": (8, {}, 16, 128),
    "hidden 768, vocabulary 32k, 6 layers, 64 x 128": (
        6,
        {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 32768},
        64,
        128,
    ),
}
RECIPE = "AwqOffloadConfig(dataset=ids, n_samples={n}, max_seq_len={tokens}, batch_tokens=1024, n_grid=4)"

QUANTITIES = {"RAM, MiB": ("above", MIB), "disk, MiB": ("disk", MIB), "seconds": ("seconds", 1)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = "time.perf_counter = time.process_time\n" if options.cpu_time else ""
    names = [f"{quantity} {words}" for quantity in QUANTITIES for words in ("planned", "taken", "ratio")]
    print(f"| shape | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for name, (n_layers, changes, n, tokens) in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            source = make_checkpoint(Path(scratch) / "source", n_layers, **changes)
            recipe = RECIPE.format(n=n, tokens=tokens)
            begin = f"{clock}ids = token_ids({str(source)!r}, {n}, {tokens})\n"
            planned = measured(
                begin + f"from hf_awq_offload import plan\np = plan({str(source)!r}, {recipe})\n"
                "more = {'above': p.ram_peak_bytes, 'disk': p.disk_bytes, 'seconds': p.seconds}"
            )
            target = Path(scratch) / "result" / "out"
            taken = measured(begin + f"quantize({str(source)!r}, {str(target)!r}, {recipe})", folder=Path(scratch))
        values = []
        for key, unit in QUANTITIES.values():
            values += [f"{planned[key] / unit:.0f}", f"{taken[key] / unit:.0f}", f"{planned[key] / taken[key]:.2f}"]
        print(f"| {name} | {' | '.join(values)} |", flush=True)
