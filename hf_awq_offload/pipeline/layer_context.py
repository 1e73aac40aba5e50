"""What the steps on one decoder layer share: the layer, its quantizable linears, the recipe, the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, cast

from torch import Tensor, nn

from ..config import AwqOffloadConfig
from ..formats.grid import Grid
from ..model.folds import InputGroup

T = TypeVar("T")


class Attempt(Protocol):
    """Runs a step, and repeats it with less memory if memory runs out; see `MemoryPressure.attempt`."""

    def __call__(self, step: Callable[[], T], *others: Callable[[], bool], reads_grams_anew: bool = True) -> T:
        """Returns what `step` returns."""
        ...


def attempt_once(step: Callable[[], T], *others: Callable[[], bool], reads_grams_anew: bool = True) -> T:
    """Returns what `step` returns, which is not repeated."""
    return step()


Undo = list[Callable[[], None]]
"""Steps that bring the model back to what it was; call them in reverse order."""


@dataclass(frozen=True)
class LayerContext:
    """One decoder layer that is to be quantized."""

    name: str
    layer: nn.Module
    quantizable: frozenset[str]  # names of linears, within the layer
    recipe: AwqOffloadConfig
    undo: Undo | None
    attempt: Attempt = attempt_once
    """Runs the steps of search and rounding."""
    between_steps: Callable[[], None] = lambda: None
    """Is called between the steps of a search, where blocks of other sizes will be allocated."""

    def linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.layer.get_submodule(name))

    def weight(self, name: str) -> Tensor:
        """Returns a linear's weight, (out, in)."""
        return self.layer.get_parameter(f"{name}.weight").detach()

    def grid(self, linear_name: str) -> Grid:
        linear = self.linear(linear_name)
        return self.recipe.grid(f"{self.name}.{linear_name}", linear.in_features, linear.weight.dtype)

    def quantizable_of(self, group: InputGroup) -> tuple[str, ...]:
        return tuple(name for name in group.consumers if name in self.quantizable)

    def replace(self, name: str, linear: nn.Linear) -> None:
        """Puts `linear` in place of the linear of this name."""
        original = self.linear(name)
        self.layer.set_submodule(name, linear)
        if self.undo is not None:
            original.to("cpu")
            self.undo.append(partial(self.layer.set_submodule, name, original))

    def remember(self, parameters: Iterable[str]) -> None:
        """Notes in `undo` what these parameters are now, as far as the layer has them."""
        if self.undo is None:
            return
        names = set(parameters)
        for name, parameter in self.layer.named_parameters():
            if name in names:
                original = parameter.detach().to("cpu", copy=True)
                self.undo.append(partial(_set_data, parameter, original))


def _set_data(parameter: nn.Parameter, original: Tensor) -> None:
    parameter.data.copy_(original)
