"""The tests of the suite that need a card, run by pytest. With pytest-xdist several processes share the card."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec

from .card_tests import CARD_TESTS, ONLY, SIMULATED_TESTS
from .recorder import Recorder
from .results import ROOT

WORKERS = 8
ENDED_BEFORE_SECONDS = 4
"""pytest is ended so long before the part is, so that what it has found by then is told."""
WORDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
RESULT_LINE = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] (\w+) (\S.*)|(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\])$"
)
"""A line of `pytest -v`, with xdist and without."""


def run(recorder: Recorder) -> None:
    lines, code = _output(recorder)
    counts, failed, skipped = dict.fromkeys(("passed", "failed", "skipped"), 0), [], []
    for word, test in filter(None, map(result_in, lines)):
        counts[WORDS[word]] += 1
        {"failed": failed, "skipped": skipped}.get(WORDS[word], []).append(test)
    for name, count in counts.items():
        recorder.figure(f"suite.{name}", count)
    recorder.details("tests", summary=lines[-1].strip("= ") if lines else "", skipped=skipped)
    if code is None:
        recorder.failure("suite", f"pytest had to be ended after {sum(counts.values())} tests")
    elif code:
        print("\n".join(lines[-60:]))
        recorder.failure("suite", f"pytest ended with {code}; failed: {failed[:8]}", failed=failed, output=lines[-400:])
    recorder.check("suite", counts["passed"] > 0, "no test has passed")


def result_in(line: str) -> tuple[str, str] | None:
    """Returns (PASSED, FAILED, …; the test) of a line of `pytest -v`, or None."""
    found = RESULT_LINE.match(line.strip())
    if found is None:
        return None
    word, test = (found[1], found[2]) if found[1] else (found[4], found[3])
    return (word, test) if word in WORDS else None


def _output(recorder: Recorder) -> tuple[list[str], int | None]:
    """Returns what pytest has printed, and its exit status; None if it had to be ended."""
    # Releases other than those that constraints.txt pins warn of other things; here it is results that count.
    options = [
        "-v",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--tb=short",
        "--color=no",
        "-W",
        "default",
    ]
    if recorder.is_simulated:
        command = [sys.executable, "-m", "simulated_gpu", *options, *SIMULATED_TESTS, "-k", ONLY]
    else:
        workers = min(WORKERS, (os.cpu_count() or 1) // 2)
        shared = ["-n", str(workers)] if find_spec("xdist") is not None and workers > 1 else []
        command = [sys.executable, "-m", "pytest", *shared, *options, *CARD_TESTS, "-k", ONLY]
    environment = {key: value for key, value in os.environ.items() if key != "SIMULATED_GPU_STARTED"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=max(1.0, recorder.seconds_left() - ENDED_BEFORE_SECONDS))
    except subprocess.TimeoutExpired:
        process.kill()  # its workers are ended with this part
        return list(lines), None
    reader.join(timeout=2)
    return lines, code


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
