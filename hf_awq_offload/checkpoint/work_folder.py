"""The folder beside a new checkpoint in which it comes to be; a rename puts it in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError, StorageError
from .durable import flush_directory, locked

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


def refuse_existing(target: Path, overwrite: bool) -> None:
    """ConfigError if there is a file, or unless `overwrite` a folder with something in it."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"out_dir {target} is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(
            f"out_dir {target} exists and is not empty; nothing was changed. Name another folder, or pass "
            "overwrite=True to put the quantized checkpoint in its place."
        )


def move_into_place(assembled: Path, target: Path, work: Path) -> None:
    """Give the finished checkpoint its name; what is there is moved aside first, and gone only after that."""
    try:
        if target.is_dir():
            os.replace(target, work / REPLACED_NAME)
        os.replace(assembled, target)
        flush_directory(target.parent)
    except OSError as error:
        raise StorageError(f"The finished checkpoint can't be moved to {target}: {error}. Repeat the call.") from error


def _clear(work: Path, target: Path) -> None:
    if (work / REPLACED_NAME).exists() and not target.exists():
        os.replace(work / REPLACED_NAME, target)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink(missing_ok=True)
