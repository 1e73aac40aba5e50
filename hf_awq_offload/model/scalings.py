"""Factors for the channels of a parameter, applied when it is used instead of to a copy that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """Multiplies a parameter w by a factor, or its 1 + w."""

    factor: Tensor | float  # a tensor broadcasts to the parameter, and has its number of dimensions
    adds_one: bool = False

    def of(self, value: Tensor, in_place: bool = False) -> Tensor:
        """Returns `value`, of the factor's dtype, scaled; the same bits in place and not."""
        if not in_place:
            return (1 + value) * self.factor - 1 if self.adds_one else value * self.factor
        return value.add_(1).mul_(self.factor).sub_(1) if self.adds_one else value.mul_(self.factor)

    def of_element(self, index: int) -> Scaling:
        """Returns the scaling of the parameter's element at `index` on the first axis."""
        if not isinstance(self.factor, Tensor):
            return self
        return Scaling(self.factor[index if self.factor.shape[0] > 1 else 0], self.adds_one)


Scalings = Mapping[str, Sequence[Scaling]]
"""Parameter's name -> what it is scaled by, one after the other."""


def scaled(value: Tensor, scalings: Sequence[Scaling], in_place: bool) -> Tensor:
    """Returns `value` with all scalings applied; it is written to only if `in_place`."""
    for scaling in scalings:
        value = scaling.of(value, in_place)
        in_place = True
    return value
