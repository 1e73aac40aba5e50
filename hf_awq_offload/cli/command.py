"""Parses a command line, runs it, prints the result and returns an exit code. An error is one line on stderr."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from typing import Any

from .outcome import FAILED, INTERRUPTED, USAGE, Interrupted, Outcome, UsageError
from .parser import parse
from .preflight import check
from .recipe_options import with_options
from .signals import Signals

LONGEST_MESSAGE = 2000
WRONG_USAGE = {UsageError.__name__, "ConfigError"}
NAMES_FIELDS = {"AwqOffloadError", "CommandError"}
"""Class names, because the package's own error classes are not imported until one is raised."""


def run_line(words: list[str], signals: Signals) -> int:
    """Runs a command line; returns the exit code."""
    try:
        options = parse(words)
    except UsageError as error:
        return _fail(error, USAGE, "--json" in words, command=None)
    except SystemExit as end:  # after --help and --version
        return int(end.code or 0)
    return run(options, signals)


def run(options: argparse.Namespace, signals: Signals) -> int:
    """Runs a parsed command line; returns the exit code."""
    try:
        outcome = _outcome(options, signals)
        _print(outcome, options)
        return outcome.exit_code
    except KeyboardInterrupt as error:
        what = str(error) or "interrupted: nothing was completed."
        return _fail(Interrupted(what), INTERRUPTED, options.json, options.command, options.debug)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        code = USAGE if kinds & WRONG_USAGE else FAILED
        names_fields = options.command == "quantize" and kinds & NAMES_FIELDS
        message = with_options(str(error)) if names_fields else str(error)
        return _fail(error, code, options.json, options.command, options.debug, message)


def _outcome(options: argparse.Namespace, signals: Signals) -> Outcome:
    check(options)
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        command = importlib.import_module(f".{options.command}", __package__)  # imports torch and transformers
        speaking = importlib.import_module(".verbosity", __package__).spoken_as_asked(options)
        with signals.interrupting(), speaking:
            return command.run(options)


def _print(outcome: Outcome, options: argparse.Namespace) -> None:
    document = {"command": options.command, **outcome.document}
    text = _as_json(document) if options.json else outcome.text
    if text:
        print(text if options.json else _printable(text), flush=True)


def _fail(
    error: BaseException,
    code: int,
    as_json: bool,
    command: str | None,
    debug: bool = False,
    message: str | None = None,  # by default the error's own
) -> int:
    if debug:
        traceback.print_exception(error)
    message = " ".join((str(error) if message is None else message).split())[:LONGEST_MESSAGE] or type(error).__name__
    if code == INTERRUPTED:
        print(message, file=sys.stderr, flush=True)
    else:
        print(f"error: {_printable(message)}", file=sys.stderr, flush=True)
    if as_json:
        kind = type(error).__name__
        failure = {"type": kind, "message": message, "exit_code": code}
        print(_as_json({"command": command, "error": failure}), flush=True)
    return code


def _as_json(value: Any) -> str:
    """Returns JSON in which nothing that a terminal would obey stands as itself."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return "".join(
        character if character == "\n" or _can_be_shown(character) else json.dumps(character)[1:-1]
        for character in text
    )


def _printable(text: str) -> str:
    """Escapes what a terminal would obey, or can't show: texts may quote names from a checkpoint."""
    return "".join(
        character if character in "\n\t" or _can_be_shown(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _can_be_shown(character: str) -> bool:
    """Returns whether a terminal shows a character as itself; in the C locale, standard output takes ASCII alone."""
    if character.isascii() or not character.isprintable():
        return character.isprintable()
    try:
        character.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
