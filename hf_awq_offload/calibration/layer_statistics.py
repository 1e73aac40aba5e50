"""Decides which tokens count for which linear: one collector for each distinct input, and for each expert.

The linears of a group share their input and so their statistics. Experts are the exception: each has statistics of the
tokens that the router sends it. An expert that saw few tokens takes the layer's pooled statistics for those that it
lacks: G = (n·G_own + (m - n)·G_pool) / m for n < m tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.experts import ExpertPart, Routing, expert_parts, routed
from ..model.folds import InputGroup, LayerStructure
from ..model.linears import linears_in
from ..search.statistics import InputStatistics, blended, pooled
from .statistics_collector import StatisticsCollector


class LayerStatistics:
    """Collects the statistics of a decoder layer while it runs.

    Args:
        layer: the decoder layer.
        structure: its groups.
        wanted: linears whose statistics are needed.
        device: where the sums live.
        every_token: send every token through every expert while collecting.
    """

    def __init__(
        self,
        layer: nn.Module,
        structure: LayerStructure,
        wanted: Collection[str],
        device: torch.device,
        every_token: bool = False,
    ):
        self.layer = layer
        self.routing = Routing.EVERY_TOKEN if every_token else Routing.TOP_K
        self.parts = expert_parts(layer)
        self.leader_of: dict[str, str] = {}
        for group in structure.groups:
            leaders: dict[str, str] = {}
            for name in group.consumers if not set(wanted).isdisjoint(group.consumers) else []:
                part = self.parts.get(name)
                self.leader_of[name] = leaders.setdefault("" if part is None else part.expert_name, name)
        linears = linears_in(layer)
        # Each leader once, in this order: a set's differs between processes, and so do sums in its order.
        inputs = {name: linears[name] for name in dict.fromkeys(self.leader_of.values())}
        self.collector = StatisticsCollector(inputs, device)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collects from every forward pass inside the context."""
        with routed(self.layer, self.routing), self.collector.collecting():
            yield

    def set_counted_tokens(
        self,
        counted: Tensor | None,  # (batch, tokens) bool
        sequences: Sequence[int] = (),  # number of each of the batch's sequences
    ) -> None:
        """Says which tokens of the next batch enter the statistics; None means all of them."""
        self.collector.set_counted_tokens(counted, sequences)

    def gathered(self, layer_name: str, min_expert_tokens: int) -> GatheredStatistics:
        """Returns what was collected; `layer_name` is for errors only.

        Raises:
            NumericalError: activations were NaN or infinite, or no token reached a linear outside experts.
        """
        own = {
            name: self.collector.take(name, layer_name, may_be_empty=name in self.parts)
            for name in self.collector.inputs
        }
        return GatheredStatistics(own, self.leader_of, self.parts, min_expert_tokens)


class GatheredStatistics:
    """Holds the statistics of a layer's groups and linears."""

    def __init__(
        self,
        own: Mapping[str, InputStatistics],  # by leader
        leader_of: Mapping[str, str],
        parts: Mapping[str, ExpertPart],
        min_expert_tokens: int,
    ):
        self.own = dict(own)
        self.leader_of = leader_of
        self.parts = parts
        self.min_expert_tokens = min_expert_tokens
        families: dict[str, list[str]] = defaultdict(list)
        for name in own:
            if name in parts:
                families[parts[name].family].append(name)
        self._pools = {family: pooled([own[name] for name in names]) for family, names in families.items()}

    def of_group(self, group: InputGroup) -> InputStatistics | None:
        """Returns the statistics of the input that a group shares, over all tokens; None if they were not collected.

        A group of a single expert has that expert's own statistics.
        """
        leaders = dict.fromkeys(self.leader_of[name] for name in group.consumers if name in self.leader_of)
        if not leaders:
            return None
        outside = [name for name in leaders if name not in self.parts]
        if outside:
            return self.own[outside[0]]
        if len(leaders) == 1:
            return self.of_linear(group, next(iter(leaders)))
        return pooled([self.own[name] for name in leaders])

    def of_linear(self, group: InputGroup, name: str) -> InputStatistics:
        """Returns the statistics of a linear's input; those of an expert that saw few tokens are filled up."""
        leader = self.leader_of[name]
        if leader not in self.parts:
            return self.own[leader]
        return blended(self.own[leader], self._pool(group, leader), self.min_expert_tokens)

    def is_of_group(self, group: InputGroup, name: str) -> bool:
        """Whether a linear's statistics are those that its group shares, not filled up or pooled."""
        leader = self.leader_of[name]
        if leader not in self.parts:
            return True
        leaders = {self.leader_of[other] for other in group.consumers if other in self.leader_of}
        return len(leaders) == 1 and self.own[leader].tokens >= self.min_expert_tokens

    def tokens_behind(self, group: InputGroup, name: str) -> int:
        """Returns how many tokens the statistics of a linear rest on: those of the pool if that fills them up."""
        own = self.own[self.leader_of[name]].tokens
        if self.leader_of[name] not in self.parts or own >= self.min_expert_tokens:
            return own
        return max(own, self._pool(group, self.leader_of[name]).tokens)

    def _pool(self, group: InputGroup, leader: str) -> InputStatistics:
        """Returns what fills up the statistics of an expert."""
        outside = [other for other in group.consumers if other not in self.parts]
        return self.own[self.leader_of[outside[0]]] if outside else self._pools[self.parts[leader].family]

    def move_to_ram(self) -> bool:
        """Moves all statistics to RAM; returns False if they are there."""
        held = [*self.own.values(), *self._pools.values()]
        if all(statistics.gram.device.type == "cpu" for statistics in held):
            return False
        for statistics in (self.own, self._pools):
            for name in statistics:
                statistics[name] = statistics[name].to(torch.device("cpu"))
        return True

    def starved(self) -> dict[str, int]:
        """Returns the experts that saw fewer tokens than the minimum -> how many they saw."""
        tokens: dict[str, int] = {}
        for name, statistics in self.own.items():
            if name in self.parts:
                expert = self.parts[name].expert_name
                tokens[expert] = max(statistics.tokens, tokens.get(expert, 0))
        return {expert: seen for expert, seen in tokens.items() if seen < self.min_expert_tokens}
