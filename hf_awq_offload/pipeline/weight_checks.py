"""Checks the weights of a decoder layer before anything is computed from them.

A scale is stored with the range of fp16 (formats/grid.py): a group that needs a larger one would be cut off without a
word. On the other side, a range below MIN_RANGE has no scale of its own: such weights become zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from ..formats.grid import (
    MIN_RANGE,
    Grid,
    GroupParameters,
    dequantize,
    exact_scale,
    group_range,
    largest_scale,
    quantize_dequantize,
)
from ..logs import get_logger
from ..messages import shortened
from ..search.chunks import row_chunks
from ..transfers import numbers_of
from .layer_context import LayerContext

logger = get_logger(__name__)

MOST_NAMED = 4
REMEDY = "Repair the checkpoint, or name the module in modules_to_not_convert."


def require_sound_weights(context: LayerContext) -> None:
    """Checks a layer that is onloaded; warns of linears whose weights are too small for any grid.

    The host waits for the device once, unless a weight is so large that it has to be looked at more closely.

    Raises:
        NumericalError: a weight that is to be quantized holds NaN or infinite values, or its grid can't span it; or
            another tensor of the layer holds NaN. Linears that stay in full precision are not looked at.
    """
    names = sorted(context.quantizable)
    others = _others(context)
    ends = [end for name in names for end in torch.aminmax(context.weight(name))]  # NaN if any weight is
    read = numbers_of([*ends, *(torch.isnan(parameter).any() for parameter in others.values())])
    tiny = [
        f"{context.name}.{name}"
        for name, low, high in zip(names, read[: len(ends) : 2], read[1 : len(ends) : 2], strict=True)
        if 0 < _checked_magnitude(context, name, low, high) < MIN_RANGE
    ]
    for name, is_nan in zip(others, read[len(ends) :], strict=True):
        if is_nan:
            raise NumericalError(
                f"{context.name}.{name} holds NaN; expected numbers, since all that follows is calibrated on what it "
                "gives. Repair the checkpoint."
            )
    if tiny:
        logger.warning(
            f"All weights of {shortened(tiny, MOST_NAMED)} are below {MIN_RANGE:g} and too small for scales in fp16: "
            "they become zero, or nearly so. Name these modules in modules_to_not_convert if they matter."
        )


def require_finite_result(
    context: LayerContext,
    name: str,
    codes: Tensor,  # (out, in)
    parameters: GroupParameters,  # (out, n)
    grid: Grid,
) -> None:
    """Raises NumericalError if a weight, once quantized, is infinite in the linear's dtype."""
    require_finite_results(context, {name: (codes, parameters)}, grid)


def require_finite_results(
    context: LayerContext,
    results: Mapping[str, tuple[Tensor, GroupParameters]],  # linear -> codes (out, in), scale and zero point (out, n)
    grid: Grid,
) -> None:
    """Raises NumericalError if a weight, once quantized, is infinite in its linear's dtype.

    The host waits for the device at most once where all is well, and never for dtypes that the largest scale that can
    be stored does not exceed.
    """
    most = {name: torch.finfo(context.weight(name).dtype).max for name in results}
    narrow = [name for name in results if largest_scale(grid) * grid.levels > most[name]]
    reaches = []  # of codes that need not be there
    for name in narrow:
        scale, zero = results[name][1]
        reaches.append((scale * torch.maximum(zero, grid.levels - zero)).max())
    for name, reach in zip(narrow, numbers_of(reaches), strict=True):
        codes, parameters = results[name]
        if reach > most[name] and float(dequantize(codes, parameters, grid).abs().max()) > most[name]:
            raise _overflows(context, name, float(context.weight(name).abs().max()), grid)


def scalable_magnitude(grid: Grid, dtype: torch.dtype) -> float:
    """Returns the largest weight that a scale may make of one: within the grid's range and that of its dtype."""
    return min(torch.finfo(dtype).max, largest_scale(grid) * (grid.levels // 2)) / 2


def _others(context: LayerContext) -> dict[str, Tensor]:
    """Returns the layer's floating-point parameters but for the weights of linears, and biases of those that stay."""
    found = {}
    for name, parameter in context.layer.named_parameters():
        module, _, kind = name.rpartition(".")
        is_kept = isinstance(context.layer.get_submodule(module), nn.Linear) and module not in context.quantizable
        is_checked = module in context.quantizable and kind == "weight"
        if not (is_kept or is_checked) and parameter.is_floating_point():
            found[name] = parameter.detach()
    return found


def _checked_magnitude(context: LayerContext, name: str, low: float, high: float) -> float:
    """Checks the weight of a linear that is to be quantized, from `low` to `high`; returns its largest magnitude."""
    weight, grid = context.weight(name), context.grid(name)
    where = f"The weight of {context.name}.{name}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NumericalError(f"{where} holds NaN or infinite values; expected finite ones. {REMEDY}")
    largest = max(-low, high)
    if largest > scalable_magnitude(grid, torch.float32) and _needed_scale(weight, grid) > largest_scale(grid):
        raise NumericalError(
            f"{where} reaches {largest:.4g}; expected weights that {grid.bits} bits can span with a scale of at most "
            f"{largest_scale(grid):.0f}, the largest that is stored. Repair the checkpoint, use more bits, or name the "
            "module in modules_to_not_convert."
        )
    most = torch.finfo(weight.dtype).max
    if largest > most / 2:
        rounded = [quantize_dequantize(weight[span].float(), grid).abs().max() for span in row_chunks(weight)]
        if max(numbers_of(rounded)) > most:
            raise _overflows(context, name, largest, grid)
    return largest


def _overflows(context: LayerContext, name: str, largest: float, grid: Grid) -> NumericalError:
    dtype = context.weight(name).dtype
    return NumericalError(
        f"The weight of {context.name}.{name} reaches {largest:.4g}; once quantized to {grid.bits} bits, some of it "
        f"would be infinite in {dtype}. Load the model with dtype=torch.bfloat16 or torch.float32, or name the module "
        "in modules_to_not_convert."
    )


def _needed_scale(
    weight: Tensor,  # (out, in)
    grid: Grid,
) -> float:
    """Returns the largest scale that any group needs."""
    needed = [exact_scale(group_range(weight[rows].float(), grid), grid).max() for rows in row_chunks(weight)]
    return max(numbers_of(needed))
