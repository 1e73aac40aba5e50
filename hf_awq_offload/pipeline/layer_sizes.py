"""How many bytes a decoder layer takes on the execution device, part by part.

structure   one parameter in fp32, and the inputs of all linears (model/probe_memory.py)
forward     the statistics, and the activations of a micro-batch
search      the statistics, a gram matrix with its factor, and the temporaries of a chunk of weights
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..model.experts import expert_parts
from ..model.fused_experts import FusedExperts, fused_experts
from ..model.linears import linears_in
from ..model.probe_memory import probing_bytes
from ..ops.blocks import matmul_dtype
from .stack_rounding import STACK_ELEMENTS

FP32_BYTES = 4
CHUNK_COPIES = 10
"""fp32 tensors of a chunk's size that rounding holds at once."""
FACTORIZING_COPIES = 3
"""Gram matrices that exist while one is factorized, beside that of the statistics: the scaled one, and two buffers."""
GRAM_COPIES = 2
"""Gram matrices that exist while a linear is rounded, beside that of the statistics: the scaled one, and its factor."""
EXPERT_LINEARS = 3
"""Linears of an expert that is not taken apart yet: gate, up and down."""


@dataclass(frozen=True)
class SearchedInput:
    """An input of linears, as the search sees it."""

    in_features: int
    largest_weight: int
    """Elements of the largest linear that reads it."""
    weights: int
    """Elements of all linears that read it."""

    def search_bytes(self, chunk_elements: int) -> int:
        """Returns what the search takes at most beside the layer's weights and statistics."""
        stack = max(self.largest_weight, min(self.weights, chunk_elements))
        gram = _gram_bytes(self.in_features)
        rounding = GRAM_COPIES * gram + CHUNK_COPIES * FP32_BYTES * min(stack, chunk_elements) + stack  # codes: bytes
        return max(FACTORIZING_COPIES * gram, rounding)


@dataclass(frozen=True)
class LayerSizes:
    """Bytes that the largest decoder layer takes, part by part."""

    weights: int
    computed_copy: int
    """A copy of the weights in the dtype that the device computes in; 0 if that is their own."""
    statistics: int
    largest_gram: int
    probing: int
    activation_bytes_per_token: int
    inputs: tuple[SearchedInput, ...]
    pinned: int = 0
    """RAM for a prefetched copy of the weights: torch rounds each pinned block up to a power of two."""

    @classmethod
    def of(cls, layers: Collection[nn.Module], device: torch.device) -> LayerSizes:
        """Returns the sizes of the largest of `layers`."""
        widest = max(layers, key=parameter_bytes)
        dtype = next(widest.parameters()).dtype
        computed = matmul_dtype(device.type, dtype)
        weights = parameter_bytes(widest)
        grams = _gram_sizes(widest)
        return cls(
            weights=weights,
            computed_copy=0 if computed == dtype else weights // dtype.itemsize * computed.itemsize,
            statistics=sum(grams),
            largest_gram=max(grams),
            probing=probing_bytes(widest),
            activation_bytes_per_token=computed.itemsize * _features_per_token(widest),
            inputs=_searched_inputs(widest),
            pinned=sum(
                _pinned_bytes(parameter.numel() * parameter.element_size()) for parameter in widest.parameters()
            ),
        )

    def search_bytes(self, chunk_elements: int | None = None) -> int:
        """Returns what the search takes beside weights and statistics; None: in chunks of the usual size."""
        return max(each.search_bytes(chunk_elements or STACK_ELEMENTS) for each in self.inputs)


def parameter_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _pinned_bytes(size_bytes: int) -> int:
    return 1 << max(0, size_bytes - 1).bit_length()


def _features_per_token(layer: nn.Module) -> int:
    """Returns how many numbers linears read and write for a token. Experts run one after another, so one counts."""
    parts, features = expert_parts(layer), 0
    of_expert: dict[str, int] = defaultdict(int)
    for name, linear in linears_in(layer).items():
        if name in parts:
            of_expert[parts[name].expert_name] += linear.in_features + linear.out_features
        else:
            features += linear.in_features + linear.out_features
    for fused in fused_experts(layer).values():
        of_expert[""] = max(of_expert[""], EXPERT_LINEARS * sum(_sides(fused)))
    return features + max(of_expert.values(), default=0)


def _searched_inputs(layer: nn.Module) -> tuple[SearchedInput, ...]:
    parts = expert_parts(layer)
    weights: dict[tuple[str, int], list[int]] = defaultdict(list)  # (expert or none, width) -> elements
    for name, linear in linears_in(layer).items():
        expert = parts[name].expert_name if name in parts else ""
        weights[expert, linear.in_features].append(linear.weight.numel())
    inputs = {SearchedInput(width, max(sizes), sum(sizes)) for (_, width), sizes in weights.items()}
    for fused in fused_experts(layer).values():
        largest = max(fused.matrix_size(matrix) for matrix in fused.matrices)
        inputs |= {SearchedInput(width, largest, 2 * largest) for width in _sides(fused)}
    return tuple(inputs)


def _sides(fused: FusedExperts) -> list[int]:
    """Returns the width of the layer and of an expert, in any order."""
    distinct = sorted(set(fused.input_widths))
    return distinct if len(distinct) > 1 else 2 * distinct


def _gram_bytes(in_features: int) -> int:
    return FP32_BYTES * in_features**2


def _gram_sizes(layer: nn.Module) -> list[int]:
    """Returns the bytes of a layer's gram matrices: one for each distinct input, as far as shapes tell, and expert."""
    parts, linears = expert_parts(layer), linears_in(layer)
    shapes = {(linear.in_features, linear.out_features) for name, linear in linears.items() if name not in parts}
    sizes = [_gram_bytes(in_features) for in_features, _ in shapes]
    of_experts = {(part.expert_name, linears[name].in_features) for name, part in parts.items()}
    sizes += [_gram_bytes(in_features) for _, in_features in of_experts]
    for fused in fused_experts(layer).values():  # not taken apart yet
        sizes += map(_gram_bytes, fused.input_widths)
    return sizes
