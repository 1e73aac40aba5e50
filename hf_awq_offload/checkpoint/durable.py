"""Writes files whole or not at all: to a second file, which is flushed to the disk and renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 22
PARTIAL_SUFFIX = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on exit flushes that file and renames it to `path`, in one step.

    After an error inside, `path` is unchanged and the other file is gone.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Makes renames in a directory durable; systems that can't open directories need no such step."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the rename itself has succeeded
        pass
    finally:
        os.close(descriptor)


def locked(path: Path) -> Any:
    """Opens a file and locks it for this process until it is closed; returns None on systems without such locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    opened = path.open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise
    return opened


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex digits."""
    digest: Any = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
