"""Finds the checkpoint that a command names: a folder on disk, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import AwqOffloadError
from .outcome import CommandError

OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Adds the checkpoint's name to errors from the hub, because it may be a mistyped folder.

    Raises:
        CommandError: `name` is not a folder and could not be downloaded.
    """
    try:
        yield
    except AwqOffloadError:
        raise
    except OSError as error:  # the base class of all hub errors
        if Path(name).is_dir():
            raise
        raise CommandError(
            f"There is no folder {name}, and it could not be downloaded from the hub: {error}"
        ) from error


def checkpoint_folder(name: str, revision: str | None) -> Path:
    """Returns the folder `name`, or downloads the hub's repository of that name, without weights in other formats."""
    if Path(name).is_dir():
        return Path(name)
    with named(name):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=OTHER_WEIGHTS))
