"""What a command hands back, and how it can end. Exit codes are part of the interface (docs/command-line.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OK = 0
FAILED = 1
USAGE = 2
DAMAGED = 3
INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """Of a command that came to its end."""

    document: dict[str, Any]  # JSON values: what --json prints
    text: str  # what is printed otherwise
    exit_code: int = OK


class UsageError(Exception):
    """The command line, or the file that it names, can't be right: exit code 2."""


class CommandError(Exception):
    """The command can't be carried out: exit code 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a word on what is left: exit code 130."""
