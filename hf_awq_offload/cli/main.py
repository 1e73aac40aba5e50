"""The entry point of the command line. It watches for signals before it imports anything that takes time."""

from __future__ import annotations

import sys

from .signals import Signals


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default the process's own; returns the exit code."""
    signals = Signals(ends_process=arguments is None)
    words = sys.argv[1:] if arguments is None else arguments
    with signals.watched(as_json="--json" in words):
        from .command import run_line  # takes a while

        return run_line(words, signals)
