"""Notices when files that a run reads are changed, replaced or removed while it is at work.

A run that lasts for hours would otherwise mix two checkpoints: layers of the old one, layers of the new one. A file's
state is its size and the time of its last change. If only the time differs, parts of the content decide: a file may be
touched, or copied again. Inode numbers were rejected: some network file systems give a file a new one whenever they
look it up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ..errors import AwqOffloadError, CheckpointError

BLOCKS, BLOCK_BYTES = 64, 4096
"""How much of a file is read to tell whether its content is the same: so many blocks at even distances."""


class FileState(NamedTuple):
    """The size of a file, and when it was last changed."""

    size_bytes: int
    changed_ns: int  # since 1970

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Raises OSError if there is no such file."""
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.changed_ns / 1e9)
        return f"{self.size_bytes} bytes of {when:%Y-%m-%d %H:%M:%S.%f}"


class FileStates:
    """Remembers what files were like when a run began.

    Args:
        files: the files; each has to exist.

    Raises:
        CheckpointError: a file can't be looked at.
    """

    def __init__(self, files: Iterable[Path] = ()):
        self._states: dict[Path, FileState] = {}
        self._digests: dict[Path, bytes] = {}
        self.add(files)

    def add(self, files: Iterable[Path]) -> None:
        """Remembers more files; those that are known stay as they were noted first."""
        for file in files:
            if file in self._states:
                continue
            try:
                self._states[file], self._digests[file] = FileState.of(file), _sampled_digest(file)
            except OSError as error:
                raise CheckpointError(
                    f"{file} can't be read: {error.strerror}. It was there a moment ago: see that nothing else writes "
                    "to the checkpoint, and repeat the call."
                ) from error

    def require_unchanged(self, files: Iterable[str | os.PathLike[str]] | None = None) -> None:
        """Raises CheckpointError if one of these files, by default of all, is not what it was; unknown ones pass."""
        for file in self._states if files is None else map(Path, files):
            before = self._states.get(file)
            if before is None:
                continue
            try:
                now = FileState.of(file)
                if now == before:
                    continue
                if now.size_bytes == before.size_bytes and _sampled_digest(file) == self._digests[file]:
                    self._states[file] = now  # touched, or copied again
                    continue
                found = str(now)
            except OSError as error:
                found = f"not to be read ({error.strerror})"
            raise CheckpointError(
                f"{file} was changed while it was in use: it was {before}, and is {found} now. The result would be "
                "made of two checkpoints, so it is not written. Put the file back as it was and repeat the call, "
                "or start over with the new file, in another checkpoint_dir."
            )


def _sampled_digest(file: Path) -> bytes:
    """Returns the SHA-256 of blocks at even distances, the first and the last among them; of all if there are few."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        last = max(os.fstat(opened.fileno()).st_size - BLOCK_BYTES, 0)
        for start in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            opened.seek(start)
            digest.update(opened.read(BLOCK_BYTES))
    return digest.digest()


@contextmanager
def blaming_changes(*states: FileStates) -> Iterator[None]:
    """After an error inside the context, looks whether files were changed meanwhile, and says so instead if they were.

    Raises:
        CheckpointError: an error occurred, and a file was changed.
    """
    try:
        yield
    except (OSError, AwqOffloadError) as error:
        for noted in states:
            try:
                noted.require_unchanged()
            except CheckpointError as reason:
                raise reason from error
        raise
