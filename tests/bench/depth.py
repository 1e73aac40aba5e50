"""Measures the peak resident memory of `quantize` for 6, 24 and 96 layers of the same shape (hidden 1024).

    python tests/bench/depth.py [--layers 6 24 96] [--source fp8] [--whole-recipe]

Above what the interpreter and its modules take. Weights are random, calibration is 4 x 128 tokens. What a layer takes
depends on the recipe, what many layers take more does not: a cheap recipe (scales, rounding to nearest) makes 96 layers
bearable.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from made import make_checkpoint, measured, size_bytes

MIB = 2**20

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24, 96])
    parser.add_argument("--source", choices=["bf16", "fp8"], default="bf16", help="how the weights are stored")
    parser.add_argument("--whole-recipe", action="store_true", help="the default recipe")
    options = parser.parse_args()
    recipe = "" if options.whole_recipe else ", n_grid=1, clip=False, rounding='nearest'"
    print("| layers | checkpoint (MiB) | peak above baseline (MiB) | to the first | seconds |\n|---|---|---|---|---|")
    first = None
    for n_layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            source = make_checkpoint(Path(scratch) / "source", n_layers, source=options.source)
            size = size_bytes(source)
            result = measured(
                f"ids = token_ids({str(source)!r}, 4, 128)\n"
                f"quantize({str(source)!r}, {str(Path(scratch) / 'out')!r}, "
                f"AwqOffloadConfig(dataset=ids, n_samples=4, max_seq_len=128{recipe}))"
            )
        above = result["above"]
        first = first or above
        print(
            f"| {n_layers} | {size / MIB:.0f} | {above / MIB:.0f} | {above / first:.3f} | {result['seconds']:.0f} |",
            flush=True,
        )
