"""Groups linears by what they read, from the inputs that a probe has seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .folds import Reader
from .row_maps import has_rows_of


def group_equal_inputs(inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Returns the names of linears with equal inputs, one tuple per distinct input."""
    groups: list[list[str]] = []
    for name, x in inputs.items():
        for group in groups:
            other = inputs[group[0]]
            if other.shape == x.shape and torch.equal(other, x):
                group.append(name)
                break
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


def parameter_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of a module's direct parameters by name."""
    return {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}


def readers_in(name: str, shapes: Mapping[str, torch.Size], channels: int) -> list[Reader]:
    """Returns those of a module's direct parameters that can multiply `channels` input channels."""
    readers = []
    for parameter_name, shape in shapes.items():
        full_name = f"{name}.{parameter_name}" if name else parameter_name
        if len(shape) in (2, 3) and shape[-1] == channels:
            readers.append(Reader(full_name, len(shape) - 1))
        elif len(shape) == 3 and shape[1] == channels:
            readers.append(Reader(full_name, 1))
    return readers


def readers_of(x: Tensor, reads: Mapping[Reader, Tensor]) -> tuple[Reader, ...]:
    return tuple(reader for reader, other in reads.items() if other.shape == x.shape and torch.equal(other, x))


def experts_beside(
    groups: Mapping[int, tuple[str, ...]],  # linears that read equal inputs
    inputs: Mapping[str, Tensor],  # (tokens, in) each
    experts: Collection[str],
) -> dict[int, list[int]]:
    """Maps a group to those of experts alone that read rows of its input, gathered or multiplied by scores."""
    beside: dict[int, list[int]] = defaultdict(list)
    for index, consumers in groups.items():
        if not all(name in experts for name in consumers):
            continue
        for other, others in groups.items():
            is_outside = any(name not in experts for name in others)
            if is_outside and has_rows_of(inputs[consumers[0]], inputs[others[0]]):
                beside[other].append(index)
                break
    return dict(beside)
