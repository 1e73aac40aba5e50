"""What a command returns, and the ways it can end. Exit codes are part of the interface (docs/command-line.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OK = 0
FAILED = 1
USAGE = 2
DAMAGED = 3
TOO_FAR = 4
INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """The result of a command that finished."""

    document: dict[str, Any]  # JSON values, printed with --json
    text: str  # printed otherwise
    exit_code: int = OK


class UsageError(Exception):
    """The command line, or the recipe file that it names, is wrong: exit code 2."""


class CommandError(Exception):
    """The command can't be carried out: exit code 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the message says what is left and how to resume: exit code 130."""
