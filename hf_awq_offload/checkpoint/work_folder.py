"""Builds a new checkpoint in a folder beside its target; a rename then puts it in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError, StorageError
from ..logs import get_logger
from .durable import flush_directory, holder_of, locked
from .output_folder import foreign_entry

logger = get_logger(__name__)

LOCK_NAME = "lock"
REPLACED_NAME = "replaced"
"""Name, within the work folder, of the folder that the new checkpoint replaces."""
DONE_NAME = "done"
"""Name of an empty file that is there once the new checkpoint is in its place."""


class InterruptedAfterwards(KeyboardInterrupt):
    """Ctrl-C came when the new checkpoint was in its place already."""


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Gives an empty folder to a run that makes `target`, to one run at a time, and removes it afterwards.

    It first removes what a killed run has left. If that run moved the old `target` aside and put nothing in its place,
    the old `target` comes back.

    Raises:
        ConfigError: another process is making the same `target`.
        StorageError: the folder can't be made.
        InterruptedAfterwards: in place of KeyboardInterrupt, once `move_into_place` was called.
    """
    work = target.with_name(f".{target.name}.work")
    if work.is_symlink():
        raise StorageError(f"{work} is a link, and its target would be emptied. Remove the link.")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = locked(work / LOCK_NAME)
    except BlockingIOError as error:
        raise ConfigError(
            f"{target} is being written by {holder_of(work / LOCK_NAME)}; wait for it, or name another folder."
        ) from error
    except OSError as error:
        raise StorageError(
            f"{work} can't be created: {error}. Name another folder, make room, or correct its permissions."
        ) from error
    is_done = False
    try:
        try:
            _clear(work, target)
            yield work
        finally:
            is_done = (work / DONE_NAME).exists()
            _leave(work, target)
    except KeyboardInterrupt as interrupt:
        if not is_done:
            raise
        raise InterruptedAfterwards(
            f"interrupted when {target} was complete already. What may be left beside it, such as a journal, can be "
            "deleted."
        ) from interrupt
    finally:
        if lock is not None:
            lock.close()


def _leave(work: Path, target: Path) -> None:
    if target.exists() or not (work / REPLACED_NAME).exists():  # else the next run brings it back
        shutil.rmtree(work, ignore_errors=True)


def move_into_place(assembled: Path, target: Path, work: Path, sources: Sequence[Path] = ()) -> None:
    """Renames the finished checkpoint to `target`; first moves what is there into `work`, which is removed later.

    What is no checkpoint came while the run was at work. It is not removed but kept beside `target`, with a warning.

    Args:
        assembled: the finished checkpoint.
        target: where it goes.
        work: the run's work folder.
        sources: folders whose files come along with the checkpoint, see `foreign_entry`.

    Raises:
        StorageError: it cannot be moved; what was there is back in its place.
    """
    aside = work / REPLACED_NAME
    try:
        if target.is_dir() and foreign_entry(target, sources) is not None:
            aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.replaced-", dir=target.parent)) / target.name
            logger.warning("%s holds files that are not part of a checkpoint; they are kept in %s.", target, aside)
        if target.is_dir():
            os.replace(target, aside)
        os.replace(assembled, target)
        with suppress(OSError):
            (work / DONE_NAME).touch()
        flush_directory(target.parent)
    except BaseException as error:
        with suppress(OSError):
            _bring_back(aside, target)
            if aside.parent != work:
                aside.parent.rmdir()  # removes it only if it is empty
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"The finished checkpoint can't be moved to {target}: {error}. Correct the permissions "
            "of the folder around it, and repeat the call."
        ) from error


def _bring_back(aside: Path, target: Path) -> None:
    """Moves what was moved aside back, unless the new checkpoint has its place."""
    if aside.exists() and not target.exists():
        os.replace(aside, target)


def _clear(work: Path, target: Path) -> None:
    _bring_back(work / REPLACED_NAME, target)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_NAME:
            path.unlink(missing_ok=True)
