"""Builds a cache of the Hub on the disk, laid out as huggingface_hub does, for tests without a network."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def commit_of(repository: str, revision: str) -> str:
    """Returns the commit that `revision` stands for in a made-up repository."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def add_to_cache(cache: Path, repository: str, revisions: dict[str, Path]) -> Path:
    """Adds a repository whose branches hold the files of these folders; returns its folder in the cache.

    Snapshots are links to blobs.
    """
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    for revision, source in revisions.items():
        commit = commit_of(repository, revision)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = folder / "snapshots" / commit / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder
