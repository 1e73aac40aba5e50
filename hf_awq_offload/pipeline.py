"""The one loop: decoder layer by decoder layer, from calibration data to packed weights.

    skeleton pass (what each layer is given) -> for each layer: onload, statistics, scales, clip, round, pack, offload

Everything numeric is a pure function of (weight, statistics) in `search/`, `grid.py` and `packing.py`; this file
only brings them together and decides nothing about numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .config import AwqOffloadConfig
from .data import CalibrationSet, micro_batches
from .errors import NumericalError
from .folds import (
    InputGroup,
    LayerStructure,
    ProbeCalls,
    ProducerKind,
    absorb,
    discover_structure,
    provable_structure,
    storable_scale,
    structure_key,
)
from .grid import Grid, group_parameters, group_range, quantize, resolve_group_size
from .layers import LayerRunner, Skeleton, calibration_mode, candidate_layers, linears_in, record_skeleton
from .linear import AwqLinear
from .packing import pack_weight
from .report import GroupReport, LayerReport, QuantizationReport
from .search.clip import search_clip
from .search.rounding import FeedbackOrder, feedback_order, round_weight
from .search.scale import ScaleSearch, output_mse, search_scale
from .statistics import InputStatistics, StatisticsCollector
from .streaming import compute_dtype, onloaded, peak_memory_bytes

PROBE_TOKENS = 32
CPU_BATCH_TOKENS = 4096
"""Micro-batch on a CPU: large enough for full-speed matrix products, small beside any model."""
ACCELERATOR_MEMORY_SHARE = 0.25
"""Share of the accelerator's free memory that a micro-batch's activations may take."""

Undo = list[Callable[[], None]]
"""What brings the model back to what it was, to be called in reverse order."""


@dataclass(frozen=True)
class LayerContext:
    """What the steps on one decoder layer share."""

    name: str
    layer: nn.Module
    quantizable: frozenset[str]  # names of linears, within the layer
    recipe: AwqOffloadConfig
    undo: Undo | None

    def grid(self, linear_name: str) -> Grid:
        group_size = resolve_group_size(self.recipe.group_size, self.linear(linear_name).in_features)
        return Grid(self.recipe.bits, group_size, self.recipe.zero_point)

    def linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.layer.get_submodule(name))


def quantize_layers(
    model: nn.Module,
    recipe: AwqOffloadConfig,
    device: torch.device,
    is_quantizable: Callable[[str], bool],  # full name of a linear -> whether to quantize it
    calibration: CalibrationSet | None,  # None: recipe.needs_calibration is False
    undo: Undo | None = None,
) -> QuantizationReport:
    """Replace the quantizable linears of `model`'s decoder layers by `AwqLinear`, in place.

    Hidden states that the *original* weights produce are passed from layer to layer.
    """
    with calibration_mode(model):
        return _quantize_layers(model, recipe, device, is_quantizable, calibration, undo)


def _quantize_layers(
    model: nn.Module,
    recipe: AwqOffloadConfig,
    device: torch.device,
    is_quantizable: Callable[[str], bool],
    calibration: CalibrationSet | None,
    undo: Undo | None,
) -> QuantizationReport:
    report = QuantizationReport()
    skeleton, batches, counted, probes = None, [], [], 0
    if calibration is not None:
        report.tokens = calibration.tokens
        first = calibration.sequences[0]
        probe_batches = [first[:PROBE_TOKENS].unsqueeze(0), first[:1].unsqueeze(0)]
        probes = len(probe_batches)
        batch_tokens = recipe.batch_tokens or default_batch_tokens(model, device)
        indices = micro_batches(calibration, batch_tokens)
        batches = [torch.stack([calibration.sequences[i] for i in batch]) for batch in indices]
        counted = [_stack_counted(calibration, batch) for batch in indices]
        skeleton = record_skeleton(model, probe_batches + batches)
    names = skeleton.layer_names if skeleton is not None else list(candidate_layers(model))
    structures: dict[object, LayerStructure] = {}
    progress = logging.tqdm(names, desc="Quantizing", unit="layer")
    for name in progress:
        start = time.perf_counter()
        layer = model.get_submodule(name)
        quantizable = frozenset(part for part in linears_in(layer) if is_quantizable(f"{name}.{part}"))
        context = LayerContext(name, layer, quantizable, recipe, undo)
        with onloaded(layer, device):
            if skeleton is None:
                groups = _quantize_without_data(context)
            else:
                structure = _structure_of(layer, _probe_calls(skeleton, name), device, recipe.seed, structures)
                statistics = _advance(context, structure, skeleton, device, counted, probes)
                groups = _quantize_with_statistics(context, structure, statistics)
        layer_report = LayerReport(name, tuple(groups), time.perf_counter() - start)
        report.layers.append(layer_report)
        progress.set_postfix_str(_progress_text(layer_report, device))
    return report


def default_batch_tokens(model: nn.Module, device: torch.device) -> int:
    """Tokens of a micro-batch when the recipe leaves it open: what a share of the free memory holds."""
    if device.type == "cpu":
        return CPU_BATCH_TOKENS
    # Alive at once in a layer's forward: about every linear's output, and fp32 copies of the widest in norms.
    layer = next(iter(candidate_layers(model).values()))
    bytes_per_token = 6 * sum(linear.out_features + linear.in_features for linear in linears_in(layer).values())
    free_bytes, _ = torch.accelerator.get_memory_info(device)
    return max(1, int(free_bytes * ACCELERATOR_MEMORY_SHARE) // bytes_per_token)


def _stack_counted(calibration: CalibrationSet, indices: list[int]) -> Tensor | None:
    """Which tokens of a micro-batch enter the statistics, (batch, tokens) bool; None when all do."""
    masks = [calibration.counted[i] for i in indices]
    if all(mask is None for mask in masks):
        return None
    ones = torch.ones(calibration.sequences[indices[0]].shape[0], dtype=torch.bool)
    return torch.stack([ones if mask is None else mask for mask in masks])


def _probe_calls(skeleton: Skeleton, name: str) -> ProbeCalls:
    several, single = ((skeleton.calls[name][index], skeleton.hidden[index]) for index in (0, 1))
    return ProbeCalls(several, single)


def _structure_of(
    layer: nn.Module, probes: ProbeCalls, device: torch.device, seed: int, known: dict[object, LayerStructure]
) -> LayerStructure:
    """Probed once per structure, and proven on every layer before it is used."""
    key = structure_key(layer)
    if key in known:
        return provable_structure(layer, known[key], probes, device, seed)
    known[key] = discover_structure(layer, probes, device, seed)
    return known[key]


def _advance(
    context: LayerContext,
    structure: LayerStructure,
    skeleton: Skeleton,
    device: torch.device,
    counted: list[Tensor | None],  # per micro-batch
    probes: int,  # batches at the front of the skeleton that are probes, not data
) -> dict[str, InputStatistics]:
    """Run the layer over all micro-batches: statistics per group (by its first linear), new hidden states in place."""
    layer = context.layer
    leaders = {
        group.consumers[0]: context.linear(group.consumers[0])
        for group in structure.groups
        if not context.quantizable.isdisjoint(group.consumers)
    }
    collector = StatisticsCollector(leaders, device)
    dtype = next(layer.parameters()).dtype
    run = LayerRunner(layer, device, compute_dtype(device, dtype))
    calls, hidden = skeleton.calls[context.name], skeleton.hidden
    with collector.collecting():
        for index in range(probes, len(hidden)):
            collector.count_only(counted[index - probes])
            output = run(calls[index], hidden[index])
            hidden[index] = output.to(device=hidden[index].device, dtype=hidden[index].dtype)
    return {name: collector.statistics(name, context.name) for name in leaders}


def _quantize_with_statistics(
    context: LayerContext, structure: LayerStructure, statistics: Mapping[str, InputStatistics]
) -> list[GroupReport]:
    """Scales for every group, folded; then clip, round and pack every linear."""
    searched = [
        (group, statistics[group.consumers[0]], _search_group_scale(context, group, statistics[group.consumers[0]]))
        for group in structure.groups
        if group.consumers[0] in statistics
    ]
    row_scales, channel_scales = _fold_scales(context, searched)
    reports = []
    for group, group_statistics, search in searched:
        quantized = tuple(name for name in group.consumers if name in context.quantizable)
        scale = channel_scales.get(quantized[0])
        gram = group_statistics.gram if scale is None else group_statistics.divided(scale).gram
        order = feedback_order(gram) if context.recipe.rounding == "error_feedback" else None
        loss = 0.0
        for name in quantized:
            clip = context.recipe.clip and name not in structure.softmax_only
            loss += _quantize_linear(context, name, scale, row_scales.get(name), gram, clip, order)
        producer = group.fold.producer if group.fold is not None else None
        reports.append(GroupReport(quantized, producer, search.alpha, search.identity_loss, loss))
    return reports


def _search_group_scale(context: LayerContext, group: InputGroup, statistics: InputStatistics) -> ScaleSearch:
    """The best scale of a group; the identity where nothing can absorb one or the search is off."""
    names = [name for name in group.consumers if name in context.quantizable]
    weights = [context.layer.get_parameter(f"{name}.weight").detach() for name in names]
    grid = context.grid(names[0])
    if group.fold is None or context.recipe.n_grid == 0:
        identity = torch.ones(weights[0].shape[1], device=statistics.gram.device)
        loss = output_mse(weights, statistics.gram, grid, identity)
        return ScaleSearch(identity, None, loss, loss)
    return search_scale(
        weights,
        statistics,
        grid,
        n_grid=context.recipe.n_grid,
        duo_scaling=context.recipe.duo_scaling,
        row_of_channel=group.fold.row_of_channel,
        rows=group.fold.rows,
        storable=partial(storable_scale, context.layer, group.fold),
    )


def _fold_scales(
    context: LayerContext, searched: list[tuple[InputGroup, InputStatistics, ScaleSearch]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fold every winner into its producer; returns what is left to do in fp32 when linears are rounded.

    Returns (row scales, channel scales): per linear, what its output rows (out,) are still to be divided by, and per
    consumer what its input channels (in,) are still to be multiplied by. A producer that will be quantized is not
    touched here: its rows are divided in fp32 on the way to the grid, without a rounding in between.
    """
    row_scales: dict[str, Tensor] = {}
    channel_scales: dict[str, Tensor] = {}
    for group, _, search in searched:
        if group.fold is None or search.alpha is None:
            continue
        row_scale = search.row_scale
        if group.fold.kind is ProducerKind.ROWS and group.fold.producer in context.quantizable:
            row_scales[group.fold.producer] = row_scale
        else:
            _remember(context, [f"{group.fold.producer}.weight", f"{group.fold.producer}.bias"])
            absorb(context.layer, group.fold, row_scale)
        scale = group.fold.channel_scale(row_scale)
        for name in group.consumers:
            if name in context.quantizable:
                channel_scales[name] = scale
            else:
                _remember(context, [f"{name}.weight"])
                context.layer.get_parameter(f"{name}.weight").data.mul_(scale)
    return row_scales, channel_scales


def _quantize_linear(
    context: LayerContext,
    name: str,
    channel_scale: Tensor | None,  # (in,) multiplies the columns
    row_scale: Tensor | None,  # (out,) divides the rows
    gram: Tensor | None,  # (in, in) fp32, of the scaled input; None without data
    clip: bool = False,
    order: FeedbackOrder | None = None,  # None rounds to the nearest
) -> float:
    """Round, pack and replace one linear; returns its mean squared output error per token, 0 without data."""
    linear = context.linear(name)
    grid = context.grid(name)
    weight = linear.weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(
            f"The weight of {context.name}.{name} holds NaN or infinite values; expected finite ones. Repair the "
            "checkpoint, or name the module in modules_to_not_convert."
        )
    bias = None if linear.bias is None else linear.bias.detach()
    if channel_scale is not None:
        weight = weight * channel_scale
    if row_scale is not None:
        weight = weight / row_scale.unsqueeze(1)
        bias = None if bias is None else (bias.float() / row_scale).to(bias.dtype)
    ranges = search_clip(weight, gram, grid) if clip and gram is not None else group_range(weight, grid)
    parameters = group_parameters(ranges, grid)
    if gram is None:
        codes, loss = quantize(weight, parameters, grid), 0.0
    else:
        codes, mse = round_weight(weight, gram, parameters, grid, order)
        if row_scale is not None:
            mse = mse * row_scale.square()  # in the units of the layer as it was
        loss = float(mse.sum(dtype=torch.float64))
    packed = pack_weight(codes, parameters)
    context.layer.set_submodule(name, AwqLinear.from_packed(packed, bias, grid, linear.weight.dtype))
    if context.undo is not None:
        linear.to("cpu")
        context.undo.append(partial(context.layer.set_submodule, name, linear))
    return loss


def _quantize_without_data(context: LayerContext) -> list[GroupReport]:
    """Round every linear to nearest, each a group of its own; losses need data and are 0."""
    for name in sorted(context.quantizable):
        _quantize_linear(context, name, None, None, None)
    return [GroupReport((name,), None, None, 0.0, 0.0) for name in sorted(context.quantizable)]


def _remember(context: LayerContext, names: list[str]) -> None:
    """Let `undo` bring back these parameters, as far as the layer has them."""
    if context.undo is None:
        return
    for name, parameter in context.layer.named_parameters():
        if name in names:
            original = parameter.detach().to("cpu", copy=True)
            context.undo.append(partial(_set_data, parameter, original))


def _set_data(parameter: nn.Parameter, original: Tensor) -> None:
    parameter.data.copy_(original)


def _progress_text(report: LayerReport, device: torch.device) -> str:
    """Layer name, loss before → after, and the peak memory so far (the accelerator's, or the process's)."""
    peak_bytes = peak_memory_bytes(device)
    return f"{report.name} loss {report.loss_nearest:.3g} → {report.loss:.3g}, peak {peak_bytes / 2**30:.2f} GiB"
