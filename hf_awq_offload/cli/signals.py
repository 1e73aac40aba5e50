"""What Ctrl-C and SIGTERM do, from the first moment of a process to its last.

while it starts     nothing has been done: one line, exit code 130. No exception is raised: it would come up in the
                    middle of some import, and imports and callbacks swallow exceptions or print them
during the command  KeyboardInterrupt; a second signal of either kind ends the process at once
once it is done     the signal ends the process at once, without a word
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 130
NOTHING_DONE = "interrupted: nothing was completed."
AS_JSON = '{"command": null, "error": {"type": "Interrupted", "message": "%s", "exit_code": %d}}\n'


class Signals:
    """Handles signals for one command line.

    Args:
        ends_process: the command line is the process's own; false where `main` is called by another program, whose
            handlers come back.
    """

    def __init__(self, ends_process: bool):
        self.ends_process = ends_process

    @contextmanager
    def watched(self, as_json: bool) -> Iterator[None]:
        """Ends the process on a signal inside the context, before and after `interrupting`."""
        if not self.ends_process:
            yield
            return

        def end(number: int, frame: Any) -> None:
            os.write(2, f"{NOTHING_DONE}\n".encode())
            if as_json:
                os.write(1, (AS_JSON % (NOTHING_DONE, EXIT_CODE)).encode())
            os._exit(EXIT_CODE)

        _handle(dict.fromkeys(WATCHED, end))
        try:
            yield
        finally:
            _handle(dict.fromkeys(WATCHED, signal.SIG_DFL))

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Has the first signal inside the context raise KeyboardInterrupt, and the second end the process."""

        def interrupt(number: int, frame: Any) -> None:
            _handle(dict.fromkeys(WATCHED, signal.SIG_DFL))
            raise KeyboardInterrupt

        before = _handle(dict.fromkeys(WATCHED, interrupt))
        try:
            yield
        finally:
            _handle(dict.fromkeys(WATCHED, signal.SIG_DFL) if self.ends_process else before)


def _handle(handlers: dict[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Sets handlers by signal; returns those before. Does nothing outside the main thread, which alone gets signals."""
    try:
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:
        return {}
