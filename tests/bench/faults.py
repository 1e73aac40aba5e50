"""Makes each call to the system that an operation makes fail once, and checks what is left and what a repeat gives.

    python tests/bench/faults.py [--operations quantize convert] [--faults full read-only] [--every 1]

Each operation runs on a tiny Llama, once for every call that opens, writes, flushes, renames or removes something; see
tests/faults/sweeping.py for what is checked. `full` and `read-only` last from that call on until the repeat.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))

from injection import FAULTS, build, swept

OPERATIONS = ("quantize", "requantize", "convert", "save")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--faults", nargs="+", default=["full", "read-only"], choices=FAULTS)
    parser.add_argument("--every", type=int, default=1, help="fail every Nth call only")
    options = parser.parse_args()
    failed = wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        library = build(Path(scratch))
        for operation in options.operations:
            for fault in options.faults:
                count, *attempts = swept(library, Path(scratch) / operation / fault, operation, fault, options.every)
                bad = [attempt for attempt in attempts if attempt["wrong"]]
                print(f"{operation:12}{fault:20}{count['calls']:5} calls{len(attempts):5} failed{len(bad):4} wrong")
                for attempt in bad:
                    print(f"    {attempt['call']}: {attempt['said']}\n        {'; '.join(attempt['wrong'])}")
                sys.stdout.flush()
                failed, wrong = failed + len(attempts), wrong + len(bad)
    print(f"{failed} failures, {failed - wrong} of them without loss and with the same bytes after the repeat")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
