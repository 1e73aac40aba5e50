"""Lets several searches wait for a device together.

Where the host reads a number from a device, it waits until all that was launched before is done, and the device then
has nothing to do until the next launch. A search that needs numbers is written as a generator: it yields the tensor
that it has to read, and continues with its values. `side_by_side` runs many of these and reads for all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

Reading = Generator[Tensor, Tensor, Result]
"""Yields 1-D fp64 tensors on a device, is sent each back on the CPU, and returns its result."""


def side_by_side(steps: Sequence[Reading[Result]], between: Callable[[], None] = lambda: None) -> list[Result]:
    """Runs generators to their ends, with one wait for all of them between a step and the next; returns their results.

    All of them are alive together, with what they keep between their steps. `between` is called after every step of
    each, where blocks of other sizes will be allocated next.
    """
    results: dict[int, Result] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(steps)))
    while answers:
        asked: dict[int, Tensor] = {}
        for index, answer in answers.items():
            try:
                asked[index] = next(steps[index]) if answer is None else steps[index].send(answer)
            except StopIteration as end:
                results[index] = end.value
            between()
        values = torch.cat([*asked.values()]).cpu() if asked else None
        parts = () if values is None else values.split([len(tensor) for tensor in asked.values()])
        answers = dict(zip(asked, parts, strict=True))
    return [results[index] for index in range(len(steps))]
