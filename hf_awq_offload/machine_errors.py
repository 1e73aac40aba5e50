"""Tells errors of the machine, such as memory that ran out, from errors that say something about a model."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .errors import CheckpointError, JournalError, MemoryLimitError

OUT_OF_MEMORY = ("error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
"""What errors of the driver, of cuBLAS and of mapped files say, which accelerate does not know."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, so that smaller micro-batches may help."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(words in str(error) for words in OUT_OF_MEMORY)


def reraise_of_machine(error: Exception) -> None:
    """Raises an error again if it is the machine's: memory ran out, or a file can't be read or written.

    Call it where a part of a model is tried, and any error means that the part does not work that way. Otherwise a
    full memory would silently leave layers in full precision, or choose another way through the model.
    """
    if is_out_of_memory(error) or isinstance(error, OSError | CheckpointError | JournalError | MemoryLimitError):
        raise error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message as a sentence; its kind if it has none."""
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return line if line.endswith(".") else f"{line}."
