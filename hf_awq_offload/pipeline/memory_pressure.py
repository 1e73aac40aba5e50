"""What a run gives up, one thing after another, when the execution device runs out of memory.

    micro-batches   half as many tokens: help forward passes (loop.py)
    read-ahead      the next layer no longer waits on the device: helps every phase
    statistics      to RAM: help forward passes, and the search
    chunks          half as many weights at a time: help search and rounding
    gram matrices   stay in RAM, and come in blocks: help search and rounding

What was given up stays given up, since the next layer is as large. None of it changes more than the last bits. The
journal notes it for each layer, so that a resumed run starts from what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ..logs import get_logger
from ..machine_errors import first_line, is_out_of_memory
from ..offload.devices import CPU, release_cached, trim_cache
from ..offload.onloader import Onloader
from ..search.chunks import ACCELERATOR_ELEMENTS, STACK_ELEMENTS, chunks_of_at_most, grams_left_in_ram

logger = get_logger(__name__)

LEAST_ELEMENTS = 2**16
"""Smallest chunk: 256 KiB for each fp32 temporary. Less would save next to nothing beside a gram matrix."""

BLOCKWISE_ELEMENTS = 2**22
"""Chunk to start from when gram matrices stay in RAM: small beside a factor, and each reads a whole matrix."""

HELPS = {
    "skeleton": "Set max_seq_len or batch_tokens to less.",
    "forward": "Set batch_tokens or max_seq_len to less: a micro-batch holds at least one text.",
    "search": "Set rounding='nearest', which needs no factorized gram matrix.",
}
"""Phase -> what needs less memory in it."""
HELPS_ALWAYS = "Free memory, raise max_memory, or name another execution_device."

Result = TypeVar("Result")


def what_helps(phase: str) -> str:
    """Returns what a user can do about memory that ran out in a phase."""
    return f"{HELPS[phase]} Or: {HELPS_ALWAYS[0].lower()}{HELPS_ALWAYS[1:]}" if phase in HELPS else HELPS_ALWAYS


class MemoryPressure:
    """Repeats steps that ran out of memory with less, and keeps what a run has given up.

    Args:
        onloader: of the run.
        statistics_device: where statistics are summed at first.
        chunk_elements: weights that the search works on at a time; None: as many as are fastest.
        grams_in_ram: whether the search reads gram matrices from RAM block by block; statistics are there, too.
        most_cached_bytes: what torch's allocator may keep of freed memory between two steps; None: all of it.
    """

    def __init__(
        self,
        onloader: Onloader,
        statistics_device: torch.device = CPU,
        chunk_elements: int | None = None,
        most_cached_bytes: int | None = None,
        grams_in_ram: bool = False,
    ):
        self.device = onloader.device
        self.statistics_device = statistics_device
        self.chunk_elements = chunk_elements
        self.grams_in_ram = grams_in_ram
        self._onloader, self._most_cached_bytes = onloader, most_cached_bytes

    def attempt(self, step: Callable[[], Result], *others: Callable[[], bool], reads_grams_anew: bool = True) -> Result:
        """Returns what `step` returns; repeats it in smaller chunks for as long as it runs out of memory.

        Args:
            step: has no effect before it returns.
            others: free more memory, in this order, once chunks are as small as they get; each returns whether it did.
            reads_grams_anew: whether gram matrices left in RAM would help `step`; not if it was given them.

        Raises:
            Exception: of the last attempt, if nothing more can be given up.
        """
        remaining = list(others)
        self.trim_cache()
        while True:
            try:
                with chunks_of_at_most(self.chunk_elements), grams_left_in_ram(self.grams_in_ram):
                    return step()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                made_room = self.stop_reading_ahead(error) or self._halve_chunks(error)
                can_leave_grams = bool(others) and reads_grams_anew
                if not (made_room or _first(remaining) or (can_leave_grams and self._leave_grams(error))):
                    raise
                error.__traceback__ = None  # it holds the temporaries
            release_cached(self.device)

    def attempt_reading_less(self, step: Callable[[], Result]) -> Result:
        """Returns what `step` returns; repeats it without reading ahead if it runs out of memory."""
        try:
            return step()
        except Exception as error:
            if not is_out_of_memory(error) or not self.stop_reading_ahead(error):
                raise
            error.__traceback__ = None
        release_cached(self.device)
        return step()

    def notes(self) -> dict[str, Any]:
        """Returns what is left, in JSON values: a resumed run has to start from it, or its last bits would differ."""
        return {
            "device": self.device.type,
            "chunk_elements": self.chunk_elements,
            "statistics_in_ram": self.statistics_device == CPU,
            "grams_in_ram": self.grams_in_ram,
        }

    def adopt(self, notes: Mapping[str, Any]) -> None:
        """Gives up what an earlier run had given up by then; `notes` is empty in journals of earlier releases.

        What another kind of device had left says nothing about this one.
        """
        if notes.get("device") != self.device.type:
            return
        noted = notes.get("chunk_elements")
        if notes.get("grams_in_ram") and not self.grams_in_ram:
            self.chunk_elements = noted  # chunks start anew then, larger than before
        else:
            self.chunk_elements = min((most for most in (self.chunk_elements, noted) if most is not None), default=None)
        if notes.get("statistics_in_ram"):
            self.statistics_device = CPU
        self.grams_in_ram = self.grams_in_ram or notes.get("grams_in_ram", False)

    def trim_cache(self) -> None:
        """Returns cached memory to the device if there is much of it: the next step's blocks have other sizes."""
        if self._most_cached_bytes is not None:
            trim_cache(self.device, self._most_cached_bytes)

    def stop_reading_ahead(self, error: Exception) -> bool:
        """Lets every layer be read when its turn comes; returns whether the next one was read before that."""
        if not self._onloader.stop_reading_ahead():
            return False
        logger.warning(
            "%s ran out of memory (%s) Continuing without reading the next layer ahead.", self.device, first_line(error)
        )
        return True

    def move_statistics(self, error: Exception) -> bool:
        """Has statistics summed in RAM from here on; returns whether they were on the device."""
        if self.statistics_device == CPU or self.device == CPU:
            return False
        logger.warning(
            "%s ran out of memory (%s) Continuing with statistics in RAM, which takes longer.",
            self.device, first_line(error),
        )  # fmt: skip
        self.statistics_device = CPU
        return True

    def _halve_chunks(self, error: Exception) -> bool:
        usual = STACK_ELEMENTS if self.device.type == "cpu" else ACCELERATOR_ELEMENTS
        elements = (self.chunk_elements or usual) // 2
        if elements < LEAST_ELEMENTS:
            return False
        logger.warning(
            "%s ran out of memory (%s) Continuing with %d weights at a time in the search.",
            self.device, first_line(error), elements,
        )  # fmt: skip
        self.chunk_elements = elements
        return True

    def _leave_grams(self, error: Exception) -> bool:
        if self.grams_in_ram or self.device.type != "cuda":
            return False
        logger.warning(
            "%s ran out of memory (%s) Continuing with gram matrices in RAM, read in blocks, which takes much longer.",
            self.device, first_line(error),
        )  # fmt: skip
        self.statistics_device, self.grams_in_ram = CPU, True
        self.chunk_elements = BLOCKWISE_ELEMENTS  # each chunk reads the whole matrix
        return True


def _first(remaining: list[Callable[[], bool]]) -> bool:
    """Calls what frees memory, one after the other, until one says that it did."""
    while remaining:
        if remaining.pop(0)():
            return True
    return False
