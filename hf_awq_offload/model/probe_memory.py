"""Says how much memory probing a decoder layer takes beside its weights.

A probe holds one parameter in fp32 at a time (`cast_parameters.py`), and the inputs of all linears twice: before and
after rows were scaled. In fp32 numbers, for t tokens:

    (2 t + 5) · Σ widths of distinct inputs + max(largest parameter + t · activations, decoding of the widest input)

On a CPU, the casts of all parameters are kept beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from .expert_interface import InterfaceExperts
from .experts import UnfusedExperts
from .fused_experts import FusedExperts, fused_experts
from .input_widths import input_widths
from .linears import linears_in
from .row_maps import LEVELS

FP32_BYTES = 4
PROBE_TOKENS = 32
"""Tokens of the longer of the two probes of text."""
ALLOCATION_BYTES = 512
"""What the allocator of an accelerator rounds sizes up to."""
WIDE_ACTIVATIONS, NARROW_ACTIVATIONS = 3, 4
"""Tensors as wide as the widest linear's output (both factors of a gated product, and the product), and as wide as the
layer (the residual, the call's own copy, the output, the reference), that exist at once."""
CHANNEL_NUMBERS = 5
"""Numbers for each input channel: the digit and the row that feeds it, int64 both, and the factor of its producer."""
ROUNDED_TENSORS = 4
"""Tensors for each input: before and after, and of the channels' numbers."""


def probing_bytes(
    layer: nn.Module, tokens: int = PROBE_TOKENS, takes_apart: bool = True, keeps_casts: bool = False
) -> int:
    """Returns the most bytes that probing holds on the device beside the layer's own weights.

    Args:
        layer: a decoder layer, on the meta device or any other.
        tokens: of the longest probe.
        takes_apart: experts that are still fused will be taken apart before they are probed.
        keeps_casts: casts to fp32 are kept, as on a CPU.
    """
    fused = fused_experts(layer) if takes_apart else {}
    widths = [*_input_widths(layer), *(width for experts in fused.values() for width in _input_widths_of(experts))]
    linears = linears_in(layer).values()
    widest = max([*widths, *(linear.out_features for linear in linears)], default=0)
    narrowest = min(widths, default=0)
    activations = tokens * (WIDE_ACTIVATIONS * widest + NARROW_ACTIVATIONS * narrowest)
    largest = max(_parameter_sizes(layer, fused), default=0)
    decoding = (2 * LEVELS + 3 * tokens) * max(widths, default=0)
    per_channel = 2 * tokens + CHANNEL_NUMBERS
    numbers = per_channel * sum(widths) + max(largest + activations, decoding)
    if keeps_casts:
        numbers += sum(parameter.numel() for parameter in layer.parameters() if parameter.dtype != torch.float32)
    return FP32_BYTES * numbers + ROUNDED_TENSORS * ALLOCATION_BYTES * len(widths)


def _parameter_sizes(layer: nn.Module, fused: dict[str, FusedExperts]) -> Iterator[int]:
    """Yields the numbers of elements of what is cast at once."""
    slices = {
        f"{name}.{matrix}".lstrip("."): experts.matrix_size(matrix)
        for name, experts in fused.items()
        for matrix in experts.matrices
    }
    for name, parameter in layer.named_parameters():
        yield slices.get(name, parameter.numel())


def _input_widths(layer: nn.Module) -> Iterator[int]:
    """Yields the features of each input that linears read, as far as shapes tell.

    Experts that share an interface read one input together, which holds the tokens of all.
    """
    yield from input_widths(layer)
    linears = linears_in(layer)
    for name, experts in layer.named_modules():
        if isinstance(experts, InterfaceExperts):
            down = linears[f"{name}.0.{experts.projections.down}".lstrip(".")]
            yield from [down.out_features, *[down.in_features] * experts.experts_total]
        elif isinstance(experts, UnfusedExperts):
            of_each = {(part.expert, linears[linear].in_features) for linear, part in experts.parts(name).items()}
            yield from (width for _, width in of_each)


def _input_widths_of(experts: FusedExperts) -> list[int]:
    """Returns the same for experts that will be taken apart."""
    if experts.layout is not None:
        return experts.input_widths
    total, *features = experts.module.get_parameter("down_proj").shape
    inner, hidden = features if cast(Any, experts.module).is_transposed else reversed(features)
    return [hidden, *[inner] * total]
