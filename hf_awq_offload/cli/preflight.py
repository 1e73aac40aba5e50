"""Checks that need only file names, made before seconds are spent on importing torch."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from ..checkpoint.output_folder import output_folder
from ..checkpoint.source_folders import places_of_files
from ..dtype_names import wrong_dtype
from ..errors import ConfigError
from .outcome import CommandError, UsageError
from .recipe_file import read_recipe_file
from .recipe_options import given_fields

HUB_TIMEOUT_SECONDS = 10
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check(options: argparse.Namespace) -> None:
    """Checks the paths of a parsed command line, and stores the recipe of `quantize` in `options.fields`.

    Raises:
        UsageError: options contradict each other, or the recipe file is wrong.
        CommandError: a path is wrong.
    """
    if options.command == "quantize":
        if options.out is None and not options.plan:
            raise UsageError("the following arguments are required: OUT; see hf-awq-offload quantize --help.")
        given = given_fields(options)
        options.fields = (read_recipe_file(options.config) if options.config else {}) | given
        if options.private and not options.push_to_hub:
            raise UsageError("--private has no effect without --push-to-hub; name a repository with --push-to-hub.")
        if options.push_to_hub and not HUB_NAME.fullmatch(options.push_to_hub):
            raise UsageError(
                f"--push-to-hub {options.push_to_hub!r} is not a repository name; expected one such as me/my-model."
            )
    remedy = wrong_dtype(getattr(options, "dtype", "auto"))
    if remedy is not None:
        raise UsageError(f"--dtype is {options.dtype!r}; {remedy}.")
    if options.command == "evaluate" and options.tasks is None and (options.limit or options.tasks_path):
        raise UsageError("--limit and --tasks-path require --tasks; to limit the text, use --tokens.")
    if getattr(options, "max_kl", None) is not None and (not options.against or options.tasks is not None):
        raise UsageError("--max-kl requires --against, and a text instead of --tasks: it bounds KL(BASE ‖ MODEL).")
    for name in ("source", "model", "against", "checkpoint"):
        if getattr(options, name, None) is not None:
            _check_source(getattr(options, name), "" if name == "against" else options.subfolder or "", options)
    if getattr(options, "against_revision", None) and not options.against:
        raise UsageError("--against-revision requires --against.")
    if (
        options.command in ("quantize", "convert", "demo")
        and not getattr(options, "plan", False)
        and options.out is not None
    ):
        _check_out(options)


def _check_source(source: str, subfolder: str, options: argparse.Namespace) -> None:
    folder = Path(source)
    if os.path.isdir(source):
        if not any(os.path.isfile(folder / subfolder / name) for name in ("config.json", "adapter_config.json")):
            raise CommandError(f"{folder / subfolder} holds no config.json; expected a checkpoint folder.")
    elif os.path.exists(source):
        raise CommandError(f"{source} is a file; expected a checkpoint folder, or a name on the Hub.")
    elif not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise CommandError(f"There is no folder {source}; expected a checkpoint folder, or a name on the Hub.")
    elif not options.local_files_only:
        _require_hub(source, options)


def _require_hub(source: str, options: argparse.Namespace) -> None:
    """Checks that the Hub answers, if `source` has to come from there; downloads would try again for a minute.

    Raises:
        CommandError: it does not.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or try_to_load_from_cache(source, "config.json", cache_dir=options.cache_dir):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # of the HTTP library that this release of huggingface_hub uses
        raise CommandError(
            f"There is no folder {source}, and it could not be downloaded: {constants.ENDPOINT} does not answer "
            f"({error}). Correct the path, or connect to the network."
        ) from error


def _check_out(options: argparse.Namespace) -> None:
    """Checks that the result can go to OUT; some commands have no --overwrite.

    Raises:
        CommandError: the result cannot go there; see `output_folder`.
    """
    source, overwrite = getattr(options, "source", None), getattr(options, "overwrite", None)
    kept = {"the source itself": source if source is not None and os.path.exists(source) else None}
    sources = []
    if overwrite and source is not None:
        sources = places_of_files(source, options.revision, options.cache_dir, options.subfolder)
    remedy = None if overwrite is None else "--overwrite"
    try:
        output_folder(options.out, bool(overwrite), field="OUT", remedy=remedy, kept=kept, sources=sources)
    except ConfigError as error:
        raise CommandError(str(error)) from error
