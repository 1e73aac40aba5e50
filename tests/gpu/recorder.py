"""What a part reports while it runs: figures, failures, and what was not run and why. One line of JSON each."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = "RESULT "
"""Begins the lines that the parent takes for records; all others are a part's chatter."""


class NotRunError(Exception):
    """Something that can't be run here, which is no failure: the message says why."""


class Recorder:
    """Sends records to the parent process.

    Args:
        part: the part that is running.
        folder: for files; removed when the part has ended.
        is_small: toy shapes.
        is_simulated: the device is the simulated one, so times mean nothing.
        commit: what is measured.
        seconds: when the part will be ended.
    """

    def __init__(self, part: str, folder: Path, is_small: bool, is_simulated: bool, commit: str, seconds: float):
        self.part, self.folder, self.commit = part, folder, commit
        self.is_small, self.is_simulated = is_small, is_simulated
        self.failures = 0
        self._end = time.monotonic() + seconds

    def figure(self, key: str, value: float | str | bool, **conditions: Any) -> None:
        """Reports a figure; figures.py says what `key` means, and its unit."""
        self._send({"figure": key, "value": value} | ({"conditions": conditions} if conditions else {}))

    def details(self, what: str, **fields: Any) -> None:
        """Reports what is in no table."""
        self._send({"details": what} | fields)

    def failure(self, what: str, why: str, **fields: Any) -> None:
        self.failures += 1
        self._send({"failure": what, "why": why} | fields)

    def not_run(self, what: str, why: str) -> None:
        self._send({"not_run": what, "why": why})

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Lets what is inside fail without taking the rest of the part along."""
        try:
            yield
        except NotRunError as error:
            self.not_run(what, str(error))
        except Exception as error:
            lines = [line.strip() for line in traceback.format_exc().splitlines()]
            self.failure(what, f"{type(error).__name__}: {str(error)[:600]}", where=lines[-9:-1])
            self._release()

    def check(self, what: str, holds: bool, why: str) -> None:
        """Reports a failure unless something holds."""
        if not holds:
            self.failure(what, why)

    def begins(self, seconds: float) -> None:
        """Tells the parent that the part begins, and after how many seconds it will be ended."""
        self._send({"begins": round(seconds)})

    def finished(self, seconds: float) -> None:
        """Tells the parent that the part has come to its end, however it went."""
        self._send({"finished": round(seconds, 1)})

    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def require_seconds(self, seconds: float) -> None:
        """Raises NotRunError where the part will be ended sooner than that."""
        if self.seconds_left() < seconds:
            raise NotRunError(f"{self.seconds_left():.0f} s are left, it may take {seconds:.0f}")

    def require_a_card(self, what: str) -> None:
        """Raises NotRunError on the simulated GPU."""
        if self.is_simulated:
            raise NotRunError(f"{what} can't be simulated")

    def _send(self, record: dict[str, Any]) -> None:
        text = json.dumps(_valid({"part": self.part} | record), default=str, allow_nan=False, ensure_ascii=False)
        print(f"\n{PREFIX}{text}", flush=True)  # on a line of its own, whatever a progress bar has left unfinished

    @staticmethod
    def _release() -> None:
        """Frees what the failed attempt has left on the device, so that the next one does not fail for it."""
        import gc

        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None:
            try:
                torch.cuda.empty_cache()
            except Exception as error:  # after an illegal access every call fails
                print(f"the device does not recover: {error}")


def _valid(value: Any) -> Any:
    """Returns null in place of NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _valid(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
