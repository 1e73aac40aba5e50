"""Quantizes a checkpoint that is larger than the process's limit on address space, within that limit.

    python tests/bench/limit.py [--layers 112] [--limit-mib 1536]

RLIMIT_AS is set before anything of the checkpoint is opened; it counts all that is mapped, files too. Random weights,
2 x 64 tokens, scales and rounding to nearest.
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
    parser.add_argument("--layers", type=int, default=112)
    parser.add_argument("--limit-mib", type=int, default=1536)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = make_checkpoint(Path(scratch) / "source", options.layers)
        size = size_bytes(source)
        if size <= options.limit_mib * MIB:
            sys.exit(f"the checkpoint has {size / MIB:.0f} MiB, no more than the limit; raise --layers")
        result = measured(
            f"ids = token_ids({str(source)!r}, 2, 64)\n"
            f"quantize({str(source)!r}, {str(Path(scratch) / 'out')!r}, AwqOffloadConfig(dataset=ids, n_samples=2, "
            "max_seq_len=64, n_grid=1, clip=False, rounding='nearest'))",
            limit=f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({options.limit_mib * MIB},) * 2)",
        )
        written = size_bytes(Path(scratch) / "out")
    resident = result["baseline"] + result["above"]
    print(
        f"checkpoint {size / MIB:.0f} MiB, limit on address space {options.limit_mib} MiB: quantized to "
        f"{written / MIB:.0f} MiB in {result['seconds']:.0f} s, resident at most {resident / MIB:.0f} MiB, "
        f"of which the interpreter and its modules have {result['baseline'] / MIB:.0f}"
    )
