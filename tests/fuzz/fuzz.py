"""Fuzzes everything that reads what others have written, and prints a table.

    python tests/fuzz/fuzz.py [--executions 1000000] [--seed 0] [--target NAME] [--atheris]

Every execution has a seed of its own, made from --seed, the target and a number, so that a failure can be repeated with
--target, --first and --executions 1. A failure is an error that is not the package's, ten seconds of processor time for
one input, or more memory than LIMIT_BYTES; a crash of the interpreter ends the run.
"""

from __future__ import annotations

import argparse
import logging
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_targets import EXPECTED, TARGETS, Run

LIMIT_BYTES = 6 << 30
SECONDS = 10


class TooSlow(BaseException):
    """One input took too long. No handler of the package's may catch this."""


@dataclass
class Result:
    """What became of the executions of one target."""

    executions: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Kinds of errors of the package: class and message without names and numbers."""
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kind of failure -> its first number, and the traceback."""
    seconds: float = 0.0


def fuzz(name: str, executions: int, seed: int, first: int = 0) -> Result:
    """Runs one target on inputs `first` … `first` + `executions` - 1."""
    run, result = TARGETS[name][0], Result()
    start = time.perf_counter()
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        for number in range(first, first + executions):
            _once(run, Random(f"{seed}/{name}/{number}"), Path(folder), result, number)
    result.seconds = time.perf_counter() - start
    return result


def _once(run: Run, random: Random, folder: Path, result: Result, number: int) -> None:
    result.executions += 1
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        run(random, folder)
    except EXPECTED as error:
        result.refused[_kind(error)] += 1
    except (Exception, TooSlow) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
        result.failures.setdefault(kind, (number, "".join(traceback.format_exception(error)[-12:])))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _kind(error: BaseException) -> str:
    words = re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|\[.*?\]|\{.*?\}|/\S+", "…", str(error))
    return f"{type(error).__name__}: {words[:40]}"


def prepare() -> None:
    """Bounds time and memory, and silences what is said about refused input."""

    def too_slow(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {SECONDS} seconds of processor time")

    signal.signal(signal.SIGPROF, too_slow)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + LIMIT_BYTES, resource.RLIM_INFINITY))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def with_atheris(name: str, seed: int) -> None:
    """Lets atheris choose seeds by coverage; it does not return. `pip install atheris` first."""
    import atheris

    run = TARGETS[name][0]
    folder = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        try:
            run(Random(data), folder)
        except EXPECTED:
            return

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-seed={seed + 1}"], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--target", choices=TARGETS, nargs="+", help="only these")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs --target")
    options = parser.parse_args()
    prepare()
    if options.atheris:
        with_atheris(options.target[0], options.seed)
    shares = {name: share for name, (_, share) in TARGETS.items() if name in (options.target or TARGETS)}
    print("| input | executions | seconds | kinds of errors | failures |\n|---|---:|---:|---:|---:|", flush=True)
    total, failures = 0, {}
    for name, share in shares.items():
        result = fuzz(name, -(-options.executions * share // sum(shares.values())), options.seed, options.first)
        total += result.executions
        failures |= {f"{name}: {kind}": first for kind, first in result.failures.items()}
        cells = (f"{result.executions:,}", f"{result.seconds:.0f}", len(result.refused), len(result.failures))
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    print(f"| all | {total:,} | | | {len(failures)} |")
    for kind, (number, text) in failures.items():
        print(f"\n{kind} (--first {number})\n{text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
