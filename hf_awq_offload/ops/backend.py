"""Defines the interface of a backend: it says which linears it cannot serve, and multiplies by the weights of the rest.

There are two kinds. A `WordsBackend` reads the AWQ words themselves. A `NativeBackend` needs another layout of the
same 4-bit integers. Words and layout can each be computed from the other, so only one of them is kept in memory.

Shapes, in all files of this package: M = rows of x, K = input channels, N = output channels, n = groups = K / g.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.awq import PackedWeight
from .blocks import Blocks, blocks_of_words, joined


class LinearShape(NamedTuple):
    """The shape of a linear, its device, and the dtype of its inputs."""

    device: torch.device  # not only its type: a machine may have several kinds of GPU
    dtype: torch.dtype
    in_features: int
    out_features: int
    group_size: int  # resolved, never -1

    @classmethod
    def of(cls, x: Tensor, scales: Tensor) -> LinearShape:
        """Returns the shape that an input x (…, K) and a weight with scales (n, N) ask for."""
        in_features = x.shape[-1]
        return cls(x.device, x.dtype, in_features, scales.shape[1], in_features // max(scales.shape[0], 1))


class NativeWeight(NamedTuple):
    """A weight in a backend's own layout, which only that backend can read."""

    words: Tensor  # the integers, as many bytes as the AWQ words
    parameters: Tensor  # scales and zero points


class Backend(ABC):
    """One way to compute x Wᵀ. Backends have no state: one instance serves all linears and threads."""

    name: str

    @abstractmethod
    def refusal(self, linear: LinearShape) -> str | None:
        """Returns why this backend cannot serve `linear` on this machine, or None if it can."""


class WordsBackend(Backend):
    """A backend that reads the AWQ words."""

    @abstractmethod
    def linear(
        self,
        x: Tensor,  # (M, K), M ≥ 1
        packed: PackedWeight,
    ) -> Tensor:
        """Returns x Wᵀ, (M, N) in x's dtype."""

    def biased_linear(
        self,
        x: Tensor,  # (M, K), M ≥ 1
        packed: PackedWeight,
        bias: Tensor,  # (N,)
    ) -> Tensor:
        """Returns x Wᵀ + bias, (M, N) in x's dtype."""
        return self.linear(x, packed).add_(bias.to(x.dtype))

    def blocks(
        self,
        packed: PackedWeight,
        dtype: torch.dtype,
    ) -> Blocks:
        """Yields the weight block by block, rounded once to `dtype`."""
        return blocks_of_words(packed, dtype)

    def dequantize(
        self,
        packed: PackedWeight,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns the weight, contiguous (N, K), rounded once to `dtype`."""
        in_features, scales = packed.qweight.shape[0], packed.scales
        return joined(self.blocks(packed, dtype), scales, scales.shape[1], in_features, dtype)


class NativeBackend(Backend):
    """A backend that reads a layout of its own."""

    @abstractmethod
    def pack(self, packed: PackedWeight) -> NativeWeight:
        """Returns the weight in this backend's layout."""

    @abstractmethod
    def unpack(
        self,
        words: Tensor,
        in_features: int,
        out_features: int,
    ) -> Tensor:
        """Inverts `pack` bit by bit, and returns qweight, (K, N / 8) int32."""

    @abstractmethod
    def linear(
        self,
        x: Tensor,  # (M, K), M ≥ 1
        native: NativeWeight,
        qzeros: Tensor,  # (n, N / 8) int32
        scales: Tensor,  # (n, N)
    ) -> Tensor:
        """Returns x Wᵀ, (M, N) in x's dtype."""

    def blocks(
        self,
        words: Tensor,
        qzeros: Tensor,  # (n, N / 8) int32
        scales: Tensor,  # (n, N)
        in_features: int,
        dtype: torch.dtype,
    ) -> Blocks:
        """Yields the weight block by block, rounded once to `dtype`."""
        qweight = self.unpack(words, in_features, scales.shape[1])
        return blocks_of_words(PackedWeight(qweight, qzeros, scales), dtype)

    def dequantize(self, words: Tensor, qzeros: Tensor, scales: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """Returns the weight, contiguous (N, K), rounded once to `dtype`."""
        weight_blocks = self.blocks(words, qzeros, scales, in_features, dtype)
        return joined(weight_blocks, scales, scales.shape[1], in_features, dtype)
