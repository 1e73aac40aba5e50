"""What can be known to be wrong from file names alone, before seconds are spent on importing torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .outcome import CommandError, UsageError
from .recipe_file import read_recipe_file
from .recipe_options import given_fields

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check(options: argparse.Namespace) -> None:
    """Look at the paths of a parsed command line; the recipe of `quantize` becomes `options.fields`.

    Raises:
        UsageError, CommandError: one of them can't be right.
    """
    if options.command == "quantize":
        given = given_fields(options)
        options.fields = (read_recipe_file(options.config) if options.config else {}) | given
        if options.private and not options.push_to_hub:
            raise UsageError("--private says how --push-to-hub pushes; name a repository with --push-to-hub.")
        if options.push_to_hub and not HUB_NAME.fullmatch(options.push_to_hub):
            raise UsageError(f"--push-to-hub {options.push_to_hub!r} is no name of a repository, such as me/my-model.")
    if options.command == "evaluate" and options.tasks is None and (options.limit or options.tasks_path):
        raise UsageError("--limit and --tasks-path belong to --tasks; --tokens limits the text.")
    for name in ("source", "model", "against", "checkpoint"):
        if getattr(options, name, None) is not None:
            _check_source(getattr(options, name))
    if options.command in ("quantize", "convert", "demo") and not getattr(options, "plan", False) and options.out:
        _check_out(Path(options.out), getattr(options, "source", None), getattr(options, "overwrite", None))


def _check_source(source: str) -> None:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CommandError(f"{source} holds no config.json; expected the folder of a checkpoint.")
    elif folder.exists():
        raise CommandError(f"{source} is a file; expected the folder of a checkpoint, or a name on the hub.")
    elif not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise CommandError(f"There is no folder {source}; expected that of a checkpoint, or a name on the hub.")


def _check_out(out: Path, source: str | None, overwrite: bool | None) -> None:
    """`overwrite` is None for a command that never does."""
    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file; name a folder for the result.")
    if source is not None and out.is_dir() and out.resolve() == Path(source).resolve():
        raise CommandError(f"{out} is the source itself; name another folder for the result.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        remedy = "Name another folder" if overwrite is None else "Name another folder, or pass --overwrite"
        raise CommandError(f"{out} exists and is not empty; nothing was changed. {remedy}.")
