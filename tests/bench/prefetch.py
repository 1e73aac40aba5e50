"""Measures the wait for weights with and without prefetching, and checks that no bit differs.

    python tests/bench/prefetch.py

Seconds that layers are waited for (`QuantizationReport.phase_seconds["onload"]`), six layers of hidden 2048 whose files
are in the page cache.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from made import make_checkpoint, measured

if __name__ == "__main__":
    print("| prefetch | waiting for weights, s | whole run, s |\n|---|---|---|")
    digests = set()
    with tempfile.TemporaryDirectory() as scratch:
        source = make_checkpoint(Path(scratch) / "source", 6, hidden_size=2048, intermediate_size=4096)
        for prefetch in (False, True, False, True):
            target = Path(scratch) / f"out-{prefetch}"
            result = measured(
                f"ids = token_ids({str(source)!r}, 4, 128)\n"
                f"report = quantize({str(source)!r}, {str(target)!r}, AwqOffloadConfig(dataset=ids, n_samples=4, "
                f"max_seq_len=128, n_grid=1, clip=False, rounding='nearest', prefetch={prefetch}), overwrite=True)\n"
                "more = {'onload': report.phase_seconds['onload']}"
            )
            digests.add(hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest())
            print(f"| {prefetch} | {result['onload']:.2f} | {result['seconds']:.1f} |", flush=True)
    print("the same output, bit for bit" if len(digests) == 1 else "DIFFERENT OUTPUT")
    sys.exit(len(digests) != 1)
