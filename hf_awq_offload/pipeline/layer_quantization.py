"""One decoder layer, from its statistics to packed weights: scales, folded, then clip, round and pack every linear.

Everything numeric is a pure function of (weight, statistics) in `search/` and `formats/`. This file brings these
together on the modules of a layer and decides nothing about numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..calibration.layer_statistics import GatheredStatistics
from ..errors import NumericalError
from ..model.folds import InputGroup, LayerStructure
from ..nn.registry import linear_class
from ..report import GroupReport, LayerReport
from ..search.gram_matrix import Gram
from ..search.rounding import FeedbackOrder, feedback_order
from ..search.scale import ScaleSearch, weights_mse
from ..search.statistics import InputStatistics
from ..transfers import numbers_of
from .layer_context import LayerContext
from .scaling import UNSCALED, LinearScales, fold_scales, search_group_scales, why_unscaled
from .stack_rounding import (
    Rounder,
    RoundingData,
    StackOutcome,
    round_and_pack,
    round_to_nearest_and_pack,
    scaled_linear,
    stacks,
)

NO_DATA = "quantized without calibration data"


class _QuantizedGroup(NamedTuple):
    """A group whose linears are replaced. What was measured may still be on the device."""

    group: InputGroup
    search: ScaleSearch
    losses_nearest: Sequence[Tensor | float]  # one per distinct input
    outcomes: Sequence[StackOutcome]
    tokens: int

    def measured(self) -> list[list[Tensor]]:
        """Returns what is to be summed: losses to nearest, as quantized and if only scaled, rows to nearest, clips."""
        clip_counts = [outcome.clip_counts for outcome in self.outcomes if outcome.clip_counts is not None]
        return [
            [_vector(loss) for loss in self.losses_nearest],
            [_vector(outcome.loss) for outcome in self.outcomes],
            [_vector(outcome.loss_scaled) for outcome in self.outcomes],
            [_vector(outcome.rows_nearest) for outcome in self.outcomes],
            clip_counts,
        ]


def quantize_with_statistics(
    context: LayerContext,
    structure: LayerStructure,
    statistics: GatheredStatistics,
    rounder: Rounder = round_and_pack,
) -> list[GroupReport]:
    """Finds and folds scales for every group, then clips, rounds, packs and replaces every linear.

    Raises:
        NumericalError: statistics of the layer, which it names, are out of the range that can be computed with.
    """
    try:
        return _quantize_groups(context, structure, statistics, rounder)
    except NumericalError as error:
        raise NumericalError(f"{context.name}: {error}") from error


def _quantize_groups(
    context: LayerContext, structure: LayerStructure, statistics: GatheredStatistics, rounder: Rounder
) -> list[GroupReport]:
    searched = context.attempt(partial(_searched, context, structure, statistics), statistics.move_to_ram)
    scales = fold_scales(context, searched)
    quantized: list[_QuantizedGroup] = []
    for group, search in searched:
        names = context.quantizable_of(group)
        inputs = _by_input(names, statistics)
        outcomes: list[StackOutcome] = []
        losses_nearest: list[Tensor | float] = []
        for sharing in inputs:
            loss = None if len(inputs) > 1 else search.identity_loss
            found = _quantize_input(context, structure, group, sharing, statistics, search, scales, rounder, loss)
            outcomes += found[0]
            losses_nearest.append(found[1])
        tokens = min(statistics.tokens_behind(group, name) for name in names)
        quantized.append(_QuantizedGroup(group, search, losses_nearest, outcomes, tokens))
    return _group_reports(context, quantized)


def _quantize_input(
    context: LayerContext,
    structure: LayerStructure,
    group: InputGroup,
    sharing: Sequence[str],  # linears of the group with one input
    statistics: GatheredStatistics,
    search: ScaleSearch,
    scales: Mapping[str, LinearScales],
    rounder: Rounder,
    loss_nearest: Tensor | float | None,  # None: still to be computed
) -> tuple[list[StackOutcome], Tensor | float]:
    """Replaces linears that read one input; returns what rounding them gave, and the loss of rounding to nearest."""
    scale = scales.get(sharing[0], UNSCALED).channels
    gram, order, own_loss = context.attempt(
        partial(_factorized, context, group, sharing, statistics, scale, loss_nearest is None), statistics.move_to_ram
    )
    nearest_mse: dict[str, Tensor] = {}
    if statistics.is_of_group(group, sharing[0]):
        names = context.quantizable_of(group)
        rows = [context.linear(name).out_features for name in names]
        nearest_mse = dict(zip(names, search.row_mse.split(rows), strict=True))
    clippable = frozenset(sharing) - structure.softmax_only if context.recipe.clip else frozenset()
    data = RoundingData(gram, order, clippable, nearest_mse)
    outcomes = []
    for stack in context.attempt(partial(stacks, context, sharing)):
        linears, outcome = context.attempt(
            partial(_rounded, context, stack, scales, data, rounder), statistics.move_to_ram, reads_grams_anew=False
        )
        for name, linear in zip(stack, linears, strict=True):
            context.replace(name, linear)
        outcomes.append(outcome)
    return outcomes, cast(Tensor, own_loss) if loss_nearest is None else loss_nearest


def quantize_without_data(context: LayerContext) -> list[GroupReport]:
    """Rounds every linear to nearest, each a group of its own; losses need data and are 0."""
    reports = []
    for name in sorted(context.quantizable):
        step = partial(round_to_nearest_and_pack, context, [scaled_linear(context, name)])
        (linear,), outcome = context.attempt(step)
        context.replace(name, linear)
        reports.append(GroupReport((name,), None, None, 0.0, 0.0, NO_DATA, None, outcome.rows, outcome.rows))
    return reports


def restore_layer(
    context: LayerContext,
    report: LayerReport,
    state: Mapping[str, Tensor] | None,  # by names within the layer; None leaves it on the meta device
) -> None:
    """Replaces a layer in full precision by the one that was quantized before."""
    for name in (name for group in report.groups for name in group.consumers):
        linear = context.linear(name)
        bias, dtype = linear.bias is not None, linear.weight.dtype
        quantized = linear_class(context.recipe.checkpoint_format)(
            linear.in_features, linear.out_features, bias, context.grid(name), dtype, device="meta"
        )
        context.layer.set_submodule(name, quantized)
    if state is not None:
        context.layer.load_state_dict(dict(state), assign=True)


def _searched(
    context: LayerContext, structure: LayerStructure, statistics: GatheredStatistics
) -> list[tuple[InputGroup, ScaleSearch]]:
    """Returns the best scale of every group that has statistics; changes nothing."""
    of_groups = [(group, found) for group in structure.groups if (found := statistics.of_group(group)) is not None]
    searches = search_group_scales(context, of_groups, _device_of(context))
    return [(group, search) for (group, _), search in zip(of_groups, searches, strict=True)]


def _factorized(
    context: LayerContext,
    group: InputGroup,
    sharing: Sequence[str],  # linears of the group with one input
    statistics: GatheredStatistics,
    scale: Tensor | None,  # (in,)
    with_loss: bool,
) -> tuple[Gram, FeedbackOrder | None, Tensor | None]:
    """Returns the gram matrix of the scaled input, its factorization, and the loss of rounding to nearest, if asked."""
    here = statistics.of_linear(group, sharing[0]).to(_device_of(context))
    loss = _identity_loss(context, sharing, here) if with_loss else None
    gram = here.gram if scale is None else here.divided(scale).gram
    del here  # where the statistics are elsewhere, this is a copy
    return gram, feedback_order(gram) if context.recipe.rounding == "error_feedback" else None, loss


def _rounded(
    context: LayerContext,
    names: Sequence[str],  # linears of one input and one grid
    scales: Mapping[str, LinearScales],
    data: RoundingData,
    rounder: Rounder,
) -> tuple[list[nn.Linear], StackOutcome]:
    """Returns what takes the places of these linears; changes nothing."""
    stack = [scaled_linear(context, name, scales.get(name, UNSCALED)) for name in names]
    return rounder(context, stack, data)


def _device_of(context: LayerContext) -> torch.device:
    """Returns where the layer is; its statistics may be elsewhere, see budget.py."""
    return next(context.layer.parameters()).device


def _by_input(names: Sequence[str], statistics: GatheredStatistics) -> list[list[str]]:
    """Splits the linears of a group by their statistics: each expert has an input of its own."""
    sharing: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sharing[statistics.leader_of[name]].append(name)
    return list(sharing.values())


def _identity_loss(context: LayerContext, names: Sequence[str], statistics: InputStatistics) -> Tensor:
    """Returns the loss of rounding linears to nearest, on the tokens that reach them, () fp64."""
    weights = [context.weight(name) for name in names]
    mse = weights_mse(weights, [context.grid(name) for name in names], statistics.gram)
    return mse.sum(dtype=torch.float64)


def _group_reports(context: LayerContext, quantized: Sequence[_QuantizedGroup]) -> list[GroupReport]:
    """Reads what was measured on the device, with one wait for the layer, and reports on each group."""
    fields = [field for each in quantized for field in each.measured()]
    numbers = iter(numbers_of([value for field in fields for value in field]))
    sums = iter([_columns_summed([[next(numbers) for _ in range(len(value))] for value in field]) for field in fields])
    reports = []
    for group, search, _, outcomes, tokens in quantized:
        (loss_nearest,), (loss,), (loss_scaled,), (rows_nearest,), clip_counts = (next(sums) for _ in range(5))
        report = GroupReport(
            consumers=context.quantizable_of(group),
            producer=group.fold.producer if group.fold is not None else None,
            alpha=search.alpha,
            loss_nearest=loss_nearest,
            loss=loss,
            unscaled=why_unscaled(context, group, search),
            loss_scaled=loss_scaled,
            rows=sum(outcome.rows for outcome in outcomes),
            rows_nearest=int(rows_nearest),
            clip_counts=tuple(int(count) for count in clip_counts),
            tokens=tokens,
            channels=context.linear(context.quantizable_of(group)[0]).in_features,
        )
        reports.append(report)
    return reports


def _columns_summed(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _vector(value: Tensor | float) -> Tensor:
    """Returns a number, a tensor of one, or a vector as a vector on its device."""
    return value.reshape(-1) if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float64)
