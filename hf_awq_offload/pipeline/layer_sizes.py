"""How many bytes a decoder layer takes on the execution device, part by part.

structure   one parameter in fp32, and the inputs of all linears (model/probe_memory.py)
forward     the statistics, and the activations of a micro-batch
search      the statistics, a gram matrix with its factor, and the temporaries of a chunk of weights
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ..model.experts import expert_parts
from ..model.fused_experts import FusedExperts, fused_experts
from ..model.input_widths import expert_input_widths, input_widths, readers_by_width
from ..model.linears import linears_in
from ..model.probe_memory import probing_bytes
from ..ops.blocks import matmul_dtype
from ..search.chunks import STACK_ELEMENTS, chunks_of_at_most
from ..search.gram_matrix import block_bytes
from ..search.large_products import parts_bytes
from ..search.ranking_memory import (
    FEEDBACK_CANDIDATES,
    GroupShape,
    feedback_ranking_bytes,
    ranking_kept_bytes,
    sampled_loss_bytes,
    whole_loss_bytes,
)
from ..search.scale import SAMPLE_ROWS, kept_elements
from ..search.working_memory import ordering_bytes, ordering_in_place_bytes, rounding_bytes

FP32_BYTES = 4
CPU_CHUNK_COPIES = 6
"""fp32 tensors of a chunk's size that rounding holds at once on a CPU, most of whose steps work on parts of it."""
CPU_FACTORIZING_COPIES = 4
"""Gram matrices that exist on a CPU while one is factorized."""
GRAM_COPIES = 2
"""Gram matrices that exist while a linear is rounded, beside that of the statistics: the scaled one, and its factor."""
RANKING_COPIES = 5
"""fp32 tensors of the size of all candidates' rows that rounding holds: w - ŵ, w', codes, steps and zero points."""
N_GRID = 20
"""Candidates for scales; their number hardly changes what the search holds."""
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
    group_size: int

    def search_bytes_on_cpu(self, chunk_elements: int) -> int:
        """Returns what search and rounding take on a CPU, beside weights and statistics."""
        gram, stack = _gram_bytes(self.in_features), self._stack_elements(chunk_elements)
        rounding = GRAM_COPIES * gram + CPU_CHUNK_COPIES * FP32_BYTES * min(stack, chunk_elements) + stack
        return max(CPU_FACTORIZING_COPIES * gram, rounding)

    def ranking_bytes(self, chunk_elements: int) -> int:
        """Returns what the search for scales takes on an accelerator, beside weights and statistics."""
        with chunks_of_at_most(chunk_elements):
            shape = GroupShape(self.weights // self.in_features, self.in_features, self.group_size)
            return max(
                whole_loss_bytes(shape),
                sampled_loss_bytes(shape, N_GRID),
                ranking_kept_bytes(shape, N_GRID) + ordering_bytes(self.in_features, chunk_elements),
                feedback_ranking_bytes(shape, N_GRID) + self._ranking_rounds(chunk_elements),
            )

    def rounding_bytes(self, chunk_elements: int) -> int:
        """Returns what factorizing and rounding take on an accelerator, beside weights and statistics."""
        gram, stack = _gram_bytes(self.in_features), self._stack_elements(chunk_elements)
        block = min(stack, chunk_elements)
        rounding = rounding_bytes(block // self.in_features, self.in_features, self.group_size, chunk_elements)
        rounding += GRAM_COPIES * gram + FP32_BYTES * block + stack
        return max(gram + ordering_bytes(self.in_features, chunk_elements), rounding)

    def blockwise_bytes(self, chunk_elements: int) -> int:
        """Returns what search and rounding take on an accelerator beside weights, if gram matrices stay in RAM."""
        gram, block, stack = (
            _gram_bytes(self.in_features), block_bytes(self.in_features), self._stack_elements(chunk_elements)
        )  # fmt: skip
        ordering = ordering_in_place_bytes(self.in_features)
        with chunks_of_at_most(chunk_elements):
            shape = GroupShape(self.weights // self.in_features, self.in_features, self.group_size)
            searching = max(
                block + whole_loss_bytes(shape),
                block + sampled_loss_bytes(shape, N_GRID),
                ranking_kept_bytes(shape, N_GRID) + ordering,
                feedback_ranking_bytes(shape, N_GRID) + self._ranking_rounds(chunk_elements),
            )
        rows = max(1, min(stack, chunk_elements) // self.in_features)
        rounding = rounding_bytes(rows, self.in_features, self.group_size, chunk_elements)
        return max(searching, ordering, gram + block + rounding + FP32_BYTES * rows * self.in_features + stack)

    def _stack_elements(self, chunk_elements: int) -> int:
        """Returns the weights of linears that are rounded together; their codes take a byte each."""
        return max(self.largest_weight, min(self.weights, chunk_elements))

    def _ranking_rounds(self, chunk_elements: int) -> int:
        """Returns what rounding takes when scales are ranked by it: every channel has a step of its own there."""
        rows = max(1, min(FEEDBACK_CANDIDATES * SAMPLE_ROWS, chunk_elements // self.in_features))
        half = self.in_features // 2
        return FP32_BYTES * RANKING_COPIES * rows * self.in_features + parts_bytes(half, half, rows, chunk_elements)


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
    device_type: str = "cpu"
    searched_elements: int = 0
    """fp32 numbers that searches keep which run side by side."""
    pinned: int = 0
    """RAM for a prefetched copy of the weights: torch rounds each pinned block up to a power of two."""

    @classmethod
    def of(cls, layers: Collection[nn.Module], device: torch.device, group_size: int = -1) -> LayerSizes:
        """Returns the sizes of the largest of `layers`; a group of -1 is a whole row."""
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
            probing=probing_bytes(widest, keeps_casts=device.type == "cpu"),
            activation_bytes_per_token=computed.itemsize * _features_per_token(widest),
            inputs=_searched_inputs(widest, group_size),
            device_type=device.type,
            searched_elements=sum(kept_elements(math.isqrt(gram // FP32_BYTES)) for gram in grams),
            pinned=sum(
                _pinned_bytes(parameter.numel() * parameter.element_size()) for parameter in widest.parameters()
            ),
        )

    def search_bytes(self, chunk_elements: int | None = None, from_ram: bool = False) -> int:
        """Returns what the search takes beside weights and statistics.

        Args:
            chunk_elements: weights that it works on at a time; None: the usual number.
            from_ram: statistics are in RAM; the copy of a gram matrix on the device is not held while rounding.
        """
        chunk = chunk_elements or STACK_ELEMENTS
        if self.device_type == "cpu":
            return max(each.search_bytes_on_cpu(chunk) for each in self.inputs)
        side_by_side = FP32_BYTES * min(self.searched_elements, chunk)
        ranking = side_by_side + max(each.ranking_bytes(chunk) for each in self.inputs)
        copied = self.largest_gram if from_ram else 0
        return max(ranking, *(each.rounding_bytes(chunk) - copied for each in self.inputs))

    def blockwise_search_bytes(self, chunk_elements: int) -> int:
        """Returns what the search takes on an accelerator beside weights, if gram matrices stay in RAM."""
        return FP32_BYTES * min(self.searched_elements, chunk_elements) + max(
            each.blockwise_bytes(chunk_elements) for each in self.inputs
        )


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


def _searched_inputs(layer: nn.Module, group_size: int) -> tuple[SearchedInput, ...]:
    """Returns what shares an input, as far as shapes tell: linears of one module and width, or of one width where
    attention and the rest read the output of the same norm."""
    weights = {
        ("", module, width): [linear.weight.numel() for linear in linears]
        for (module, width), linears in readers_by_width(layer).items()
    }
    linears = linears_in(layer)
    for name, part in expert_parts(layer).items():
        own = weights.setdefault((part.expert_name, "", linears[name].in_features), [])
        own.append(linears[name].weight.numel())
    inputs = {
        SearchedInput(width, max(sizes), sum(sizes), _group(group_size, width))
        for (*_, width), sizes in weights.items()
    }
    for fused in fused_experts(layer).values():
        largest = max(fused.matrix_size(matrix) for matrix in fused.matrices)
        inputs |= {SearchedInput(width, largest, 2 * largest, _group(group_size, width)) for width in _sides(fused)}
    return tuple(inputs)


def _group(group_size: int, width: int) -> int:
    """Returns the group size of an input of this width; one that does not divide it is refused elsewhere."""
    return width if group_size <= 0 else min(group_size, width)


def _sides(fused: FusedExperts) -> list[int]:
    """Returns the width of the layer and of an expert, in any order."""
    distinct = sorted(set(fused.input_widths))
    return distinct if len(distinct) > 1 else 2 * distinct


def _gram_bytes(in_features: int) -> int:
    return FP32_BYTES * in_features**2


def _gram_sizes(layer: nn.Module) -> list[int]:
    """Returns the bytes of a layer's gram matrices: one for each distinct input, as far as shapes tell, and expert."""
    widths = [*input_widths(layer), *expert_input_widths(layer)]
    for fused in fused_experts(layer).values():  # not taken apart yet
        widths += fused.input_widths
    return [*map(_gram_bytes, widths)]
