"""The folder beside a new checkpoint in which it comes to be; a rename puts it in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable import locked
from .errors import ConfigError, StorageError

LOCK_NAME = "lock"
REPLACED_NAME = "replaced"
"""What was in the new checkpoint's place."""


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """An empty folder for a run that makes `target`, gone afterwards; one run at a time has it.

    What a run that was killed has left is removed. What it had moved aside for the new checkpoint, and put nothing in
    the place of, comes back first.

    Raises:
        ConfigError: another process makes the same `target`.
        StorageError: the folder can't be made.
    """
    work = target.with_name(f".{target.name}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = locked(work / LOCK_NAME)
    except BlockingIOError as error:
        raise ConfigError(f"Another process is quantizing to {target}; wait for it, or name another folder.") from error
    except OSError as error:
        raise StorageError(f"{work} can't be made: {error}. Correct the folder's permissions.") from error
    try:
        _clear(work, target)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            lock.close()


def _clear(work: Path, target: Path) -> None:
    if (work / REPLACED_NAME).exists() and not target.exists():
        os.replace(work / REPLACED_NAME, target)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink(missing_ok=True)
