"""Folds the scales of a linear's input into the norm or linear that produces it.

AWQ multiplies the input channels of a linear by s and divides the producer of that input by s. `fold_probing.py` finds
the producer by measuring; this file defines the kinds of producers and divides them without losing precision.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from .scalings import Scaling

SHARED = "its parameters, or those of what feeds it, are shared with another module"
NOT_EXACT = "a scale would change what this layer yields: the proof failed"


class ProducerKind(Enum):
    """The way in which a producer's output channels are multiplied by a factor."""

    ROWS = "rows"  # a linear: weight rows and bias
    NORM = "norm"  # a norm: weight, and bias if there is one
    NORM_PLUS_ONE = "norm_plus_one"  # a norm that multiplies by 1 + weight (Gemma)


@dataclass(frozen=True)
class Fold:
    """A producer that can absorb the 1/s of an input group."""

    producer: str  # module name within the layer
    kind: ProducerKind
    row_of_channel: Tensor  # (in,) int64: the producer's output row that feeds each input channel
    rows: int  # output rows of the producer

    def fed_rows(self) -> Tensor:
        """Returns which output rows of the producer feed an input channel, (rows,) bool; the others are not scaled."""
        fed = torch.zeros(self.rows, dtype=torch.bool)
        fed[self.row_of_channel.cpu()] = True
        return fed

    def channel_scale(
        self,
        row_scale: Tensor,  # (rows,)
    ) -> Tensor:
        """Returns the scale of every input channel, (in,)."""
        return row_scale[self.row_of_channel.to(row_scale.device)]


@dataclass(frozen=True)
class Reader:
    """A parameter other than a linear's weight that multiplies a group's input, such as a router's."""

    parameter: str  # name within the layer
    axis: int  # axis of the input channels

    def multiplier(
        self,
        channel_scale: Tensor,  # (in,)
        ndim: int,  # of the parameter
    ) -> Tensor:
        """Returns the factor of the parameter: `channel_scale` along `axis`, every other axis of size 1."""
        shape = [1] * ndim
        shape[self.axis] = -1
        return channel_scale.view(shape)


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same input, and the fold that can absorb its scale (None: none was found or proven)."""

    consumers: tuple[str, ...]
    fold: Fold | None
    readers: tuple[Reader, ...] = ()
    """Other parameters that have to be multiplied by the scale; used only together with a fold."""
    refused: str | None = None
    """Why a fold that was found is not used."""


@dataclass(frozen=True)
class LayerStructure:
    """The structure that probing found in one decoder layer; layers with equal `structure_key` share it."""

    groups: tuple[InputGroup, ...]
    softmax_only: frozenset[str]
    """Linears that only steer a softmax over tokens (q, k), and so do not influence the output for a single token."""


def structure_key(layer: nn.Module) -> tuple[object, ...]:
    """Returns a key of a layer's classes, shapes and plain settings, which depends on neither weights nor index."""
    key: list[object] = []
    for name, module in layer.named_modules():
        settings = tuple(
            (attribute, value)
            for attribute, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and attribute not in ("layer_idx", "training")
        )
        shapes = tuple((key_, tuple(tensor.shape)) for key_, tensor in module.named_parameters(recurse=False))
        key.append((name, type(module), settings, shapes))
    return tuple(key)


def without_folds_of(
    structure: LayerStructure,
    parameters: Collection[str],  # names within the layer
) -> LayerStructure:
    """Returns `structure` without the folds that would change any of `parameters`."""

    def touches(group: InputGroup) -> bool:
        modules = group.consumers if group.fold is None else (*group.consumers, group.fold.producer)
        names = {f"{module}.{name}" for module in modules for name in ("weight", "bias")}
        return not names.union(reader.parameter for reader in group.readers).isdisjoint(parameters)

    kept = [
        InputGroup(group.consumers, None, refused=SHARED) if group.fold is not None and touches(group) else group
        for group in structure.groups
    ]
    return LayerStructure(tuple(kept), structure.softmax_only)


def producer_scalings(
    tensors: Mapping[str, Tensor],  # the layer's parameters by name
    fold: Fold,
    factor: Tensor,  # (rows,)
) -> dict[str, Scaling]:
    """Returns what to scale each of the producer's parameters by to multiply output row r by factor[r]."""
    name, bias_name = f"{fold.producer}.weight", f"{fold.producer}.bias"
    plus_one = fold.kind is ProducerKind.NORM_PLUS_ONE
    scalings = {name: Scaling(factor if plus_one or tensors[name].ndim == 1 else factor.unsqueeze(1), plus_one)}
    if tensors.get(bias_name) is not None:
        scalings[bias_name] = Scaling(factor)
    return scalings


def scaled_producer(
    tensors: Mapping[str, Tensor],  # the layer's parameters by name
    fold: Fold,
    factor: Tensor,  # (rows,)
) -> dict[str, Tensor]:
    """Returns the producer's parameters with output row r multiplied by factor[r], computed in factor's dtype."""
    result = {}
    for name, scaling in producer_scalings(tensors, fold, factor).items():
        result[name] = scaling.of(tensors[name].to(factor.dtype))
    return result


def storable_scales(
    layer: nn.Module,
    fold: Fold,
    row_scales: Tensor,  # (n, rows) fp32
) -> tuple[Tensor, Tensor]:
    """Returns the effective scales of dividing the producer by each of `row_scales`, and which can be stored.

    After the division by s, a norm's weight w is rounded to its dtype. Multiplying the consumers by w / round(w / s)
    makes the fold exact despite that (except for a bias, whose own rounding remains). A scale cannot be stored if a
    channel would overflow, vanish or change its sign. The host does not wait for the device.

    Returns:
        The scales, (n, rows) fp32, and (n,) bool.
    """
    name = f"{fold.producer}.weight"
    if fold.kind is ProducerKind.ROWS:
        tensors = layer.get_submodule(fold.producer).named_parameters(recurse=False)
        # Rounding is monotone: a row overflows only if the largest of its weights does.
        largest = [value.detach().abs().flatten(1).amax(dim=1) if value.ndim > 1 else value for _, value in tensors]
        divided = [(value.detach().float() * (1 / row_scales)).to(value.dtype) for value in largest]
        return row_scales, torch.stack([torch.isfinite(value).all(dim=1) for value in divided]).all(dim=0)
    stored = _divided_producer(layer, fold, row_scales)
    offset = 1 if fold.kind is ProducerKind.NORM_PLUS_ONE else 0
    before = layer.get_parameter(name).detach().float() + offset
    after = stored[name].float() + offset
    lost = (before != 0) & (before * after <= 0)
    for value in stored.values():
        lost |= ~torch.isfinite(value)
    return torch.where(before == 0, row_scales, before / after), ~lost.any(dim=1)


def absorb(
    layer: nn.Module,
    fold: Fold,
    row_scale: Tensor,  # (rows,) fp32, as `storable_scales` returned it
) -> None:
    """Divides the producer's output channels by `row_scale`, in place."""
    for name, value in _divided_producer(layer, fold, row_scale).items():
        layer.get_parameter(name).data.copy_(value)


def _divided_producer(layer: nn.Module, fold: Fold, row_scale: Tensor) -> dict[str, Tensor]:
    """Returns the producer's parameters, divided by `row_scale` and rounded to their dtypes."""
    module = layer.get_submodule(fold.producer)
    tensors = {f"{fold.producer}.{name}": value.detach() for name, value in module.named_parameters(recurse=False)}
    return {
        name: value.to(tensors[name].dtype) for name, value in scaled_producer(tensors, fold, 1 / row_scale).items()
    }
