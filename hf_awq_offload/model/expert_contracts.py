"""What a mixture's forward takes, and how its arguments change so that experts compute other tokens.

Letters: E experts, H hidden size, T tokens, k experts per token, n rows that are sorted by expert.

A contract makes small inputs for a proof, and runs a module under a `Routing`. It is found by trying: the module has to
run on the contract's inputs, and `expert_layouts.py` compares what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .experts import Routing

PROBE_ROWS = 2
"""Rows per expert in a proof."""

Forward = Callable[..., Tensor]


class Contract(Protocol):
    """The arguments of an experts module's forward."""

    def inputs(
        self,
        hidden_size: int,
        experts: Sequence[int],  # that must be reached
        total: int,  # experts
        generator: torch.Generator,
    ) -> tuple[Any, ...]:
        """Returns random arguments in fp32."""
        ...

    def run(
        self,
        forward: Forward,
        arguments: Sequence[Any],
        routing: Routing,
        total: int,
        also: Callable[[int, Tensor], object],  # expert, rows that it has to see without use for the output
    ) -> Tensor:
        """Returns the output of `forward` under a routing."""
        ...


@dataclass(frozen=True)
class RoutedTokens:
    """Hidden states (T, H), and for each token int64 experts (T, k) and weights (T, k) or (T, E)."""

    index_position: int
    weights_position: int
    has_all_weights: bool
    """The weights are (T, E)."""

    def inputs(
        self, hidden_size: int, experts: Sequence[int], total: int, generator: torch.Generator
    ) -> tuple[Any, ...]:
        chosen = torch.tensor(experts)
        index = torch.stack([chosen, chosen.roll(1)], dim=1)
        tokens = len(experts)
        weights = torch.rand(tokens, total if self.has_all_weights else 2, generator=generator) + 0.5
        values = {
            0: torch.randn(tokens, hidden_size, generator=generator),
            self.index_position: index,
            self.weights_position: weights,
        }
        return tuple(values[position] for position in sorted(values))

    def run(
        self,
        forward: Forward,
        arguments: Sequence[Any],
        routing: Routing,
        total: int,
        also: Callable[[int, Tensor], object],
    ) -> Tensor:
        changed = list(arguments)
        if routing is Routing.TOP_K:
            return forward(*changed)
        index, weights = changed[self.index_position], changed[self.weights_position]
        chosen, shape = index.reshape(-1, index.shape[-1]), index.shape[:-1]
        given = weights.reshape(chosen.shape[0], -1)
        everyone = torch.arange(total, device=index.device, dtype=index.dtype).expand(chosen.shape[0], total)
        is_expert = chosen < total  # beyond: experts without weights, such as LongCat-Flash's identities
        if self.has_all_weights:
            mask = torch.zeros_like(given).scatter(1, chosen, 1.0)
            of_each = given * mask
        else:
            of_each = torch.zeros(chosen.shape[0], total, dtype=given.dtype, device=given.device)
            of_each = of_each.scatter_add(1, chosen.where(is_expert, 0), given * is_expert)
        if routing is Routing.UNIFORM:
            of_each = torch.full_like(of_each, 1 / total)
        elif not self.has_all_weights and not bool(is_expert.all()):
            everyone = torch.cat([everyone, chosen.where(~is_expert, chosen.max())], dim=1)
            of_each = torch.cat([of_each, given * ~is_expert], dim=1)
        changed[self.index_position] = everyone.reshape(*shape, -1)
        changed[self.weights_position] = of_each.reshape(*shape, -1)
        return forward(*changed)


@dataclass(frozen=True)
class GroupedTokens:
    """Inputs of each expert, (E · T, H): those that it should not compute are zero, and so is what it makes of them."""

    def inputs(
        self, hidden_size: int, experts: Sequence[int], total: int, generator: torch.Generator
    ) -> tuple[Any, ...]:
        x = torch.randn(total, PROBE_ROWS, hidden_size, generator=generator)
        x[::2, 0] = 0
        return (x.reshape(-1, hidden_size),)

    def run(
        self,
        forward: Forward,
        arguments: Sequence[Any],
        routing: Routing,
        total: int,
        also: Callable[[int, Tensor], object],
    ) -> Tensor:
        if routing is Routing.TOP_K:
            return forward(*arguments)
        x, *rest = arguments
        grouped = x.reshape(total, -1, x.shape[-1])
        token = grouped.sum(dim=0, keepdim=True)  # a multiple of what the router has multiplied by its scores
        if routing is Routing.UNIFORM:
            everyone = (token / total).expand_as(grouped)
            return forward(everyone.reshape_as(x), *rest)
        is_own = (grouped != 0).any(dim=-1, keepdim=True)
        output = forward(grouped.where(is_own, token).reshape_as(x), *rest)
        return output * is_own.reshape(-1, 1).to(output.dtype)


@dataclass(frozen=True)
class WeightedTokens:
    """Hidden states (T, H) that all experts compute, and a weight for each token and expert, (T, E)."""

    def inputs(
        self, hidden_size: int, experts: Sequence[int], total: int, generator: torch.Generator
    ) -> tuple[Any, ...]:
        x = torch.randn(PROBE_ROWS, hidden_size, generator=generator)
        return x, torch.rand(PROBE_ROWS, total, generator=generator) + 0.5

    def run(
        self,
        forward: Forward,
        arguments: Sequence[Any],
        routing: Routing,
        total: int,
        also: Callable[[int, Tensor], object],
    ) -> Tensor:
        return forward(*arguments)


@dataclass(frozen=True)
class SortedRows:
    """Rows (n, in) sorted by expert, and the number of rows of each expert, as a list or a tensor.

    A mixture of such modules has one for each projection.
    """

    is_list: bool

    def inputs(
        self, hidden_size: int, experts: Sequence[int], total: int, generator: torch.Generator
    ) -> tuple[Any, ...]:
        sizes = [index % (PROBE_ROWS + 1) if index in experts else 0 for index in range(total)]
        sizes[-1] = PROBE_ROWS
        x = torch.randn(sum(sizes), hidden_size, generator=generator)
        return x, sizes if self.is_list else torch.tensor(sizes)

    def run(
        self,
        forward: Forward,
        arguments: Sequence[Any],
        routing: Routing,
        total: int,
        also: Callable[[int, Tensor], object],
    ) -> Tensor:
        x, sizes, *rest = arguments
        if routing is Routing.TOP_K:
            return forward(*arguments)
        if routing is Routing.UNIFORM:
            even = [len(x) // total + (expert < len(x) % total) for expert in range(total)]
            return forward(x, even if self.is_list else torch.tensor(even, device=sizes.device), *rest)
        counts = sizes if self.is_list else sizes.tolist()
        begin = 0
        for expert, count in enumerate(counts):
            also(expert, torch.cat([x[:begin], x[begin + count :]]))
            begin += count
        return forward(*arguments)


CONTRACTS: dict[int, tuple[Contract, ...]] = {
    1: (GroupedTokens(),),
    2: (WeightedTokens(), SortedRows(is_list=True), SortedRows(is_list=False)),
    3: (
        RoutedTokens(1, 2, has_all_weights=False),
        RoutedTokens(2, 1, has_all_weights=False),
        RoutedTokens(1, 2, has_all_weights=True),
        RoutedTokens(2, 1, has_all_weights=True),
    ),
}
"""Contracts by the number of arguments that a forward requires."""
