"""Finds the checkpoint that a command names: a folder on disk, or a name on the Hub."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..checkpoint.companion_files import MODULES_NAME, OTHER_WEIGHTS, module_folders
from ..errors import AwqOffloadError
from .outcome import CommandError


@contextmanager
def named(name: str) -> Iterator[None]:
    """Explains errors in which transformers does not name the checkpoint as the user did, or not the option to pass.

    Raises:
        CommandError: `name` is not a folder and could not be downloaded; or it holds code, which may not run.
    """
    try:
        yield
    except AwqOffloadError:
        raise
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CommandError(
            f"{name} comes with code of its own, which runs only if you allow it. Read the code, then pass "
            "--trust-remote-code."
        ) from error
    except OSError as error:  # the base class of all hub errors
        if Path(name).is_dir():
            raise
        raise CommandError(
            f"There is no folder {name}, and it could not be downloaded from the Hub: {error}"
        ) from error


def checkpoint_folder(name: str, options: argparse.Namespace) -> Path:
    """Returns the folder `name`, or downloads the Hub's repository of that name, without weights in other formats.

    With --subfolder, it is that folder of the checkpoint.
    """
    subfolder = options.subfolder or ""
    if Path(name).is_dir():
        return Path(name, subfolder)
    arguments = {name: value for name, value in hub_arguments(options).items() if name != "subfolder"}
    wanted: dict[str, Any] = {"ignore_patterns": OTHER_WEIGHTS}
    if subfolder:
        others = [pattern for pattern in OTHER_WEIGHTS if pattern != "*/*.safetensors"]
        wanted = {"allow_patterns": f"{glob.escape(subfolder)}/*", "ignore_patterns": others}
    with named(name):
        folder = Path(snapshot_download(name, **wanted, **arguments))
        modules = folder / subfolder / MODULES_NAME
        if modules.is_file() and not subfolder:  # their weights are part of the model
            inside = [f"{glob.escape(path)}/*" for path in module_folders(modules.read_text(encoding="utf-8"))]
            if inside:
                snapshot_download(name, allow_patterns=inside, **arguments)
    return folder / subfolder


def hub_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that say where the files of the command's checkpoint come from."""
    given = {name: getattr(options, name, None) for name in ("revision", "subfolder", "cache_dir")}
    arguments = {name: value for name, value in given.items() if value}
    return arguments | ({"local_files_only": True} if options.local_files_only else {})
