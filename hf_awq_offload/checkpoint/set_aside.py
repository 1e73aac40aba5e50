"""Keeps tensors of a checkpoint that is about to be overwritten, until the new one has them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..logs import get_logger
from .safetensors import tensor_places
from .stored_tensor import CarriedTensor, files_of, require_unchanged, write_all

logger = get_logger(__name__)


@contextmanager
def set_aside(tensors: dict[str, CarriedTensor], folder: Path, dtype: torch.dtype) -> Iterator[None]:
    """Copies those of `tensors` that are in files of `folder` to a folder beside it, inside the context.

    `tensors` says where they are: in the copy, and after the context in the files that `folder` holds by then. After
    an error, the copy stays.

    Args:
        tensors: by their names in the checkpoint; changed in place.
        folder: is overwritten inside the context.
        dtype: of what is dequantized.

    Raises:
        CheckpointError: a file is gone, or has been changed.
        OSError: the copy can't be written.
    """
    inside = {
        name: stored
        for name, stored in tensors.items()
        if any(folder.resolve() in (file.parent.resolve(), file.resolve().parent) for file in files_of(stored))
    }
    if not inside:
        yield
        return
    require_unchanged(inside)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.resolve().name}-", dir=folder.resolve().parent))
    try:
        file = aside / "kept.safetensors"
        write_all(file, inside, dtype)
    except BaseException:
        shutil.rmtree(aside)  # nothing has been overwritten yet
        raise
    tensors |= tensor_places(file)
    try:
        yield
        there = {name: place for path in folder.glob("*.safetensors") for name, place in tensor_places(path).items()}
        if missing := sorted(inside.keys() - there.keys()):
            raise CheckpointError(f"{folder} lacks {missing[0]} after it was saved; save the model once more.")
    except BaseException:
        logger.warning(f"{len(inside)} tensors that were in {folder} are kept in {file}. Save the model once more.")
        raise
    tensors |= {name: there[name] for name in inside}
    shutil.rmtree(aside)
