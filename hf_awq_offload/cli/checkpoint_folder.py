"""What a command calls a checkpoint: a folder on the disk, or a name on the hub."""

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
    """What goes wrong in getting a checkpoint from the hub is told with its name, which may be a mistyped folder."""
    try:
        yield
    except AwqOffloadError:
        raise
    except OSError as error:  # all errors of the hub are
        if Path(name).is_dir():
            raise
        raise CommandError(f"There is no folder {name}, and it can't be had from the hub: {error}") from error


def checkpoint_folder(name: str, revision: str | None) -> Path:
    """A folder as it is; of a name on the hub, everything but weights in other formats is fetched."""
    if Path(name).is_dir():
        return Path(name)
    with named(name):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=OTHER_WEIGHTS))
