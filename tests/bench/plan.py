"""What `plan` predicts against what `quantize` then takes, on several shapes.

    python tests/bench/plan.py

Peak resident memory above that of the process before, and seconds. Both in processes of their own; random weights.
"""

from __future__ import annotations

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

if __name__ == "__main__":
    print("| shape | predicted MiB | taken MiB | ratio | predicted s | taken s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (n_layers, changes, n, tokens) in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            source = make_checkpoint(Path(scratch) / "source", n_layers, **changes)
            recipe = RECIPE.format(n=n, tokens=tokens)
            begin = f"ids = token_ids({str(source)!r}, {n}, {tokens})\n"
            planned = measured(
                begin + f"from hf_awq_offload import plan\np = plan({str(source)!r}, {recipe})\n"
                "more = {'plan_bytes': p.ram_peak_bytes, 'plan_seconds': p.seconds}"
            )
            taken = measured(begin + f"quantize({str(source)!r}, {str(Path(scratch) / 'out')!r}, {recipe})")
        above = taken["above"]
        print(
            f"| {name} | {planned['plan_bytes'] / MIB:.0f} | {above / MIB:.0f} | {planned['plan_bytes'] / above:.2f} "
            f"| {planned['plan_seconds']:.1f} | {taken['seconds']:.1f} | "
            f"{planned['plan_seconds'] / taken['seconds']:.2f} |",
            flush=True,
        )
