"""Runs each part in a process of its own. A part that fails, crashes or hangs costs only itself.

While a part runs, the process of the next one starts and imports what it needs, which takes seconds and touches no
device. Then it waits for its turn; its time counts from there.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .parts import BY_NAME, Part
from .recorder import PREFIX
from .results import ROOT

PACKAGE = "hf_awq_offload"
READY, GO = "READY", "GO"
START_SECONDS = 120
"""What a process may take to import everything; only the first one is waited for."""
TAIL_LINES = 25
Command = Callable[[Sequence[Part]], list[str]]


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: str
    status: str  # "passed", "failed", "not run" (it can't be here), "no time"
    seconds: float
    why: str = ""


class PartProcess:
    """A process that runs parts, one after the other.

    Args:
        parts: what it runs.
        command: the command line.
    """

    def __init__(self, parts: Sequence[Part], command: list[str]):
        self.parts = parts
        self.folder = tempfile.TemporaryDirectory(prefix="hf_awq_offload-gpu-", ignore_cleanup_errors=True)
        inherited_paths = filter(None, [os.environ.get("PYTHONPATH")])
        paths = [str(ROOT), str(ROOT / "tests"), *inherited_paths, *_metadata_folder(Path(self.folder.name))]
        own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET",)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | own | {"TMPDIR": self.folder.name}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(
        self, seconds: float, latest: float, heard: Callable[[dict[str, Any]], None]
    ) -> tuple[int | None, list[str]]:
        """Lets it run for `seconds`, by the clock no longer than until `latest`; `heard` gets its records.

        Returns:
            The exit status, None if it had to be ended, and the last lines that are no records.
        """
        tail: list[str] = []
        end = min(time.monotonic() + START_SECONDS, latest)
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.end()
                return None, tail
            if line is None:
                return self.process.wait(), tail
            if line.strip() == READY:
                end = min(time.monotonic() + seconds, latest)
                self._say(f"{GO} {end - time.monotonic()} {self.folder.name}\n")
            elif (record := _record_in(line)) is not None:
                heard(record)
            elif line.strip():
                tail = [*tail[1 - TAIL_LINES :], line.rstrip()]

    def end(self) -> None:
        """Ends the process, and those that it has started, if it still runs; removes its files."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.folder.cleanup()

    def _say(self, text: str) -> None:
        with suppress(BrokenPipeError):  # it has ended; its exit status says why
            assert self.process.stdin is not None
            self.process.stdin.write(text)
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def _record_in(line: str) -> dict[str, Any] | None:
    """Returns the record of a line; None if it is none, or the process has ended in the middle of it."""
    if not line.startswith(PREFIX):
        return None
    try:
        record: dict[str, Any] = json.loads(line[len(PREFIX) :])
        return record
    except json.JSONDecodeError:
        return None


def _metadata_folder(folder: Path) -> list[str]:
    """Returns what has to be on the path for the package to know its version where it is not installed."""
    try:
        version(PACKAGE)
        return []
    except PackageNotFoundError:
        pass
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    information = folder / "metadata" / f"{PACKAGE}-{found[1]}.dist-info"
    information.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {found[1]}\n"
    (information / "METADATA").write_text(text, encoding="utf-8")
    return [str(information.parent)]


class Runner:
    """Runs parts in turn.

    Args:
        command: makes the command line of the process for some parts.
        limit_seconds: for all parts together.
        patience: factor to the limits of single parts.
        heard: gets every record.
        say: prints a line.
    """

    def __init__(
        self,
        command: Command,
        limit_seconds: float,
        patience: float,
        heard: Callable[[dict[str, Any]], None],
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):
        self.command, self.heard, self.say = command, heard, say
        self.patience, self.start = patience, time.monotonic()
        self.end = self.start + limit_seconds

    def run(self, groups: Sequence[Sequence[Part]]) -> list[Outcome]:
        """Runs groups of parts; each group has a process of its own. Returns how each part ended."""
        outcomes: list[Outcome] = []
        waiting: PartProcess | None = None
        running: PartProcess | None = None
        try:
            for index, parts in enumerate(groups):
                left = self.end - time.monotonic()
                if left < sum(part.worth_seconds for part in parts):
                    outcomes += [Outcome(part.name, "no time", 0.0, f"{max(left, 0):.0f} s are left") for part in parts]
                    continue
                running = waiting or PartProcess(parts, self.command(parts))
                waiting = None
                if index + 1 < len(groups):
                    following = groups[index + 1]
                    waiting = PartProcess(following, self.command(following))
                outcomes += self._outcomes(running, left)
                running.end()
                if any(outcome.why.startswith(NO_DEVICE) for outcome in outcomes):
                    break
                if waiting is not None and self.end - time.monotonic() < sum(p.worth_seconds for p in waiting.parts):
                    waiting.end()
                    waiting = None
        finally:
            for process in (running, waiting):
                if process is not None:
                    process.end()
        return outcomes

    def _outcomes(self, process: PartProcess, left: float) -> list[Outcome]:
        seconds = min(self.patience * sum(part.seconds for part in process.parts), left)
        begun = time.monotonic()
        failures: dict[str, str] = {}
        left_out: dict[str, str] = {}
        finished: dict[str, float] = {}

        def heard(record: dict[str, Any]) -> None:
            name = record["part"]
            if "failure" in record:
                failures.setdefault(name, f"{record['failure']}: {record['why']}")
            if record.get("not_run") == name:
                left_out[name] = record["why"]
            if "finished" in record:
                finished[name] = record["finished"]
            if "begins" in record:
                what = BY_NAME[name].what if name in BY_NAME else ""
                self.say(f"\n== {name}: {what} (at {time.monotonic() - self.start:.0f} s, limit {record['begins']} s)")
            self.heard(record | {"at_seconds": round(time.monotonic() - self.start, 1)})

        code, tail = process.run(seconds, self.end, heard)
        took = time.monotonic() - begun
        result = []
        for part in process.parts:
            own_seconds = finished.get(part.name, took)
            if part.name in left_out:
                result.append(Outcome(part.name, "not run", own_seconds, left_out[part.name]))
            elif part.name in failures:
                result.append(Outcome(part.name, "failed", own_seconds, failures[part.name]))
            elif part.name in finished:
                result.append(Outcome(part.name, "passed", own_seconds))
            elif code is None and part.is_extra:
                result.append(Outcome(part.name, "no time", own_seconds, f"did not end within {seconds:.0f} s"))
            else:
                why = f"did not end within {seconds:.0f} s" if code is None else f"its process ended with {code}"
                result.append(Outcome(part.name, "failed", own_seconds, why))
                self.heard({"part": part.name, "failure": part.name, "why": why, "last_lines": tail})
        if code != 0:
            for line in tail:
                self.say(f"     {line[:300]}")
        return result


NO_DEVICE = "no CUDA device"
