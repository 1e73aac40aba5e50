"""Copies a layer's outputs from the execution device to RAM while the next micro-batch runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..transfers import pinned_like
from .hidden_states import HiddenWriter


class HiddenReadback:
    """Passes a layer's outputs on to a writer, in order.

    From a CUDA device, an output is copied to pinned memory behind the work that makes it, and written when the next
    one is on its way, so that the device has work while the host writes. At most one output waits. Without pinned
    memory, each is copied and written at once.
    """

    def __init__(self, writer: HiddenWriter):
        self._writer = writer
        self._waiting: tuple[Tensor, torch.cuda.Event] | None = None

    def append(self, output: Tensor, dtype: torch.dtype) -> None:
        """Takes a batch of outputs, to be written in `dtype`.

        Raises:
            ModelStructureError, StorageError: as `HiddenWriter.append`, for this output or the one before.
        """
        output = output.to(dtype)
        buffer = pinned_like(output) if output.device.type == "cuda" else None
        if buffer is None:
            self.finish()
            self._writer.append(output.cpu())
            return
        buffer.copy_(output, non_blocking=True)
        copied = torch.cuda.current_stream(output.device).record_event()
        self.finish()
        self._waiting = buffer, copied

    def finish(self) -> None:
        """Writes what still waits."""
        if self._waiting is not None:
            (buffer, copied), self._waiting = self._waiting, None
            copied.synchronize()
            self._writer.append(buffer.clone() if self._writer.file is None else buffer)  # the writer keeps it in RAM
