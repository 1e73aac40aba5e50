"""`python -m tests.gpu`: measures everything on the GPU of this machine, in parts, in nine minutes (docs/gpu.md)."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import table, values_of
from .parts import BY_NAME, PARTS, Part
from .processes import Outcome, Runner
from .results import Results, commit_of_checkout

PASSED, FAILED, TIME_RAN_OUT = 0, 1, 3
SECONDS = 540
SIMULATED_PATIENCE = 6.0
"""The simulated GPU computes on a CPU, which others may be using as well."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.simulated:
        why = _why_not_simulated()
        if why is not None:
            print(f"{why}.")
            return FAILED
    parts = [BY_NAME[name] for name in options.only] if options.only else list(PARTS)
    commit = options.commit or commit_of_checkout()
    patience = SIMULATED_PATIENCE if options.simulated else 1.0
    limit = options.limit or SECONDS * patience
    results = Results(options.out, commit)
    kind = {"small": options.small, "simulated": options.simulated}
    results.add({"started": results.started, "commit": commit, "parts": [part.name for part in parts]} | kind)
    print(f"{len(parts)} parts, at most {limit:.0f} s, commit {commit}; results are appended to {results.path}")

    def command(group: Sequence[Part]) -> list[str]:
        names = ",".join(part.name for part in group)
        flags = [f"--{name}" for name, given in kind.items() if given]
        return [sys.executable, "-u", "-m", "gpu.part_process", names, commit, *flags]

    def heard(record: dict[str, Any]) -> None:
        results.add(record)
        line = _line(record)
        if line:
            print(f"  {line}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # so that the parts' processes are ended, too
    start = time.monotonic()
    runner = Runner(command, limit, patience, heard)
    outcomes = runner.run([parts] if options.together else [[part] for part in parts])
    for outcome in outcomes:
        results.add({"outcome": vars(outcome)})
    print(f"\n== {time.monotonic() - start:.0f} s in all")
    print(_summary(parts, outcomes))
    print(f"\n{table({_heading(results, commit, kind): values_of(results.records)})}")
    if options.small or options.simulated:
        print("\nToy shapes or a simulated device: this shows that the command works, and measures nothing.")
    print(f"\n{results.path}")
    return exit_code(parts, outcomes)


def exit_code(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> int:
    """Returns 1 if a part failed or none passed, 3 if there was no time for one that is not an extra, else 0."""
    found = {outcome.part: outcome.status for outcome in outcomes}
    if "failed" in found.values():
        return FAILED
    if any(found.get(part.name) == "no time" and not part.is_extra for part in parts):
        return TIME_RAN_OUT
    return PASSED if "passed" in found.values() else FAILED


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", type=_names, metavar="PART,…", help=f"some parts, in this order: {names}")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"in all ({SECONDS})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append results to FILE (a new file in gpu-results/)")
    parser.add_argument("--commit", help="what is measured, where this is no checkout of git")
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--simulated", action="store_true", help="on the simulated GPU; asks for --small")
    parser.add_argument("--together", action="store_true", help="all parts in one process: less to start, less apart")
    options = parser.parse_args(arguments)
    if options.simulated and not options.small:
        parser.error("--simulated asks for --small: other shapes would take hours there")
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is no part; there are {', '.join(BY_NAME)}")
    return names


def _why_not_simulated() -> str | None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from simulated_gpu.build import why_not

    return why_not()


def _line(record: dict[str, Any]) -> str:
    """Returns how a record is printed while the run goes on; empty for those that only the file has."""
    at = f"[{record.get('at_seconds', 0):5.1f}]"
    if "figure" in record:
        if record["part"] == "linears":  # its details have them line by line
            return ""
        value = record["value"]
        return f"{at} {record['figure']}: {f'{value:.6g}' if isinstance(value, float) else value}"
    if "failure" in record:
        return f"{at} FAILED {record['failure']}: {record['why'][:300]}"
    if "not_run" in record:
        return f"{at} not run: {record['not_run']}: {record['why']}"
    if "details" in record:
        rest = {key: value for key, value in record.items() if key not in ("part", "details", "at_seconds", "output")}
        return f"{at} {record['details']}: {str(rest)[:600]}"
    return ""


def _summary(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> str:
    found = {outcome.part: outcome for outcome in outcomes}
    lines = []
    for part in parts:
        outcome = found.get(part.name, Outcome(part.name, "not run", 0.0, "the run had ended"))
        why = f": {outcome.why[:300]}" if outcome.why else ""
        lines.append(f"{part.name:12} {outcome.status:8} {outcome.seconds:6.1f} s{why}")
    return "\n".join(lines)


def _heading(results: Results, commit: str, kind: dict[str, bool]) -> str:
    machine = next((record for record in results.records if record.get("details") == "machine"), {})
    card = str(machine.get("card", "unknown card"))
    marks = "".join(f", {name}" for name, given in kind.items() if given)
    return f"{card}, {commit[:10]}, {results.started[:10]}{marks}"


if __name__ == "__main__":
    sys.exit(main())
