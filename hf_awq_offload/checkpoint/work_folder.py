"""The folder beside a new checkpoint in which it comes to be; a rename puts it in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        if target.exists() or not (work / REPLACED_NAME).exists():  # else the next run brings it back
            shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            lock.close()


def refuse_existing(target: Path, overwrite: bool, field: str = "out_dir") -> None:
    """Refuse a file, and unless `overwrite` a folder with something in it; `field` is what the user calls `target`.

    Raises:
        ConfigError: one of these is there.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{field} {target} is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(
            f"{field} {target} exists and is not empty; nothing was changed. Name another folder, or pass "
            "overwrite=True to put the quantized checkpoint in its place."
        )


def move_into_place(assembled: Path, target: Path, work: Path) -> None:
    """Give the finished checkpoint its name; a folder that is there is moved into `work` first.

    Raises:
        StorageError: it can't be moved; what was there is back in its place.
    """
    try:
        if target.is_dir():
            os.replace(target, work / REPLACED_NAME)
        os.replace(assembled, target)
        flush_directory(target.parent)
    except OSError as error:
        with suppress(OSError):
            _bring_back(work, target)
        raise StorageError(f"The finished checkpoint can't be moved to {target}: {error}. Repeat the call.") from error


def _bring_back(work: Path, target: Path) -> None:
    """Move what was moved aside back, unless the new checkpoint has its place."""
    if (work / REPLACED_NAME).exists() and not target.exists():
        os.replace(work / REPLACED_NAME, target)


def _clear(work: Path, target: Path) -> None:
    _bring_back(work, target)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink(missing_ok=True)
