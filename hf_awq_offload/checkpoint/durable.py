"""Writes files whole or not at all: to a second file, which is flushed to the disk and renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

READ_BYTES = 1 << 22
PARTIAL_SUFFIX = ".partial"
HOLDER = re.compile(r"process \d+ on \S+")
"""What a lock file says while it is locked."""


_locks: WeakSet[Any] = WeakSet()
"""Locks that this process holds."""


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """Gives a path beside `path` to write to; on exit flushes that file and renames it to `path`, in one step.

    After an error inside, `path` is unchanged and the other file is gone. Without `flush` the file may be lost when the
    machine stops.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    remove_link(partial)
    try:
        yield partial
        if flush:
            flush_file(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if flush:
        flush_directory(path.parent)


def flush_file(path: Path) -> None:
    """Makes a file's bytes durable."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def remove_link(path: Path) -> None:
    """Removes a link that stands where a file is to be written, so that what it leads to is not overwritten."""
    if path.is_symlink():
        path.unlink()


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

    The file then says which process that is.

    Raises:
        BlockingIOError: another process holds the lock; `holder_of` says which.
        OSError: the file can't be opened, or is a link: what it leads to would be overwritten.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    opened = os.fdopen(descriptor, "a", encoding="utf-8")  # not truncated: that would erase the holder's name
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "a lock has to be a regular file", str(path))
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        opened.close()
        raise
    _locks.add(opened)
    with suppress(OSError):  # on a full disk the lock holds all the same, without a name
        os.ftruncate(opened.fileno(), 0)
        os.write(opened.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return opened


def _let_go_in_child() -> None:
    """Closes what a forked process has of the locks: else they would last until it ends, too."""
    for opened in list(_locks):
        opened.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def holder_of(path: Path) -> str:
    """Returns which process has locked a file, such as "process 4242 on node7", or "another process"."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    return text if HOLDER.fullmatch(text) else "another process"


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex digits."""
    digest: Any = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
