"""Says which lines of the package launch kernels on the simulated GPU, and which make the host wait for it."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from . import observed

PACKAGE = "/hf_awq_offload/"


class CountsByLine(TorchDispatchMode):
    """Counts by the innermost function of the package, and the line, that an operator was called from."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = observed.counters()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            after = observed.counters()
            launches = after["launches"] - before["launches"]
            waits = after["synchronizations"] - before["synchronizations"]
            if launches or waits:
                line = _calling_line(sys._getframe(1))
                self.launches[line] += launches
                self.waits[line] += waits


def _calling_line(frame: FrameType | None) -> str:
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition(PACKAGE)
        if found:
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the package"
