"""Makes a layer of a journal durable: flushes and hashes its files, then writes the commit that names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.durable import file_digest, flush_directory, flush_file, replacing
from .journal_commits import sealed


def write_commit(
    file: Path,  # the layer's tensors; the commit will lie beside it
    entry: Mapping[str, Any],  # "hidden" has the name, size, shapes and dtype of the hidden states' file, or is None
) -> None:
    """Writes the commit of a layer whose files are in place.

    Raises:
        OSError: something could not be written; there is no commit then.
    """
    hidden = entry["hidden"]
    files = [file] if hidden is None else [file, file.with_name(hidden["file"])]
    for path in files:
        flush_file(path)
    flush_directory(file.parent)
    digests = [file_digest(path) for path in files]
    tensors = {"file": file.name, "bytes": file.stat().st_size, "sha256": digests[0]}
    hashed = None if hidden is None else {**hidden, "sha256": digests[1]}
    with replacing(file.with_suffix(".json")) as partial:
        partial.write_text(sealed({**entry, "tensors": tensors, "hidden": hashed}), encoding="utf-8")
