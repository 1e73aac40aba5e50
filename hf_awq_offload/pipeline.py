"""The one loop: decoder layer by decoder layer, from calibration data to packed weights.

    skeleton pass (what each layer is given) -> for each layer: onload, statistics, scales, clip, round, pack, offload

Everything numeric is a pure function of (weight, statistics) in `search/`, `grid.py` and `packing.py`; this file
only brings them together and decides nothing about numbers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .config import AwqOffloadConfig
from .data import CalibrationSet, micro_batches
from .errors import NumericalError
from .feeds import PROBES, Feed, layers_that_run, open_feed
from .folds import InputGroup, LayerStructure, ProducerKind, absorb, storable_scale, structure_key, without_folds_of
from .gathering import GatheredStatistics, LayerStatistics
from .grid import Grid, group_parameters, group_range, quantize, resolve_group_size
from .layers import LayerRunner, calibration_mode, candidate_layers, shared_parameters
from .linear import AwqLinear
from .linears import linears_in
from .packing import pack_weight
from .probing import ProbeCalls, discover_structure, provable_structure
from .report import GroupReport, LayerReport, QuantizationReport
from .search.clip import search_clip
from .search.rounding import FeedbackOrder, feedback_order, round_weight
from .search.scale import ScaleSearch, output_mse, search_scale
from .statistics import InputStatistics
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
    if calibration is None:
        run_layer = partial(_run_layer, model, device)
        for name in logging.tqdm(layers_that_run(model, run_layer), desc="Quantizing", unit="layer"):
            context = _context(model, name, recipe, is_quantizable, undo)
            with onloaded(context.layer, device):
                report.layers.append(LayerReport(name, tuple(_quantize_without_data(context)), 0.0))
        return _with_layers_left_out(report, model, is_quantizable)
    report.tokens = calibration.tokens
    first = calibration.sequences[0]
    probe_batches = [first[:PROBE_TOKENS].unsqueeze(0), first[:1].unsqueeze(0)]
    indices = micro_batches(calibration, recipe.batch_tokens or default_batch_tokens(model, device))
    batches = [torch.stack([calibration.sequences[i] for i in batch]) for batch in indices]
    counted = [None] * len(probe_batches) + [_stack_counted(calibration, batch) for batch in indices]
    structures: dict[object, LayerStructure] = {}
    shared = shared_parameters(model)
    collectors: dict[str, LayerStatistics] = {}
    found: dict[str, LayerStructure] = {}
    seconds: dict[str, float] = defaultdict(float)
    with open_feed(model, probe_batches + batches, partial(_run_layer, model, device)) as feed:
        progress = logging.tqdm(total=len(feed.layer_names), desc="Quantizing", unit="layer")
        for visit in feed.visits():
            name = visit.name
            start = time.perf_counter()
            context = _context(model, name, recipe, is_quantizable, undo)
            with onloaded(context.layer, device):
                if name not in found:
                    structure = _structure_of(context.layer, feed.probes(name), device, recipe.seed, structures)
                    found[name] = without_folds_of(structure, shared[name])
                    collectors[name] = LayerStatistics(
                        context.layer, found[name], context.quantizable, device, recipe.all_experts
                    )
                _advance(context, feed, collectors[name], device, counted)
                groups, starved = [], {}
                if visit.is_last:
                    statistics = collectors.pop(name).gathered(name, recipe.min_expert_tokens)
                    starved = statistics.starved()
                    groups = _quantize_with_statistics(context, found[name], statistics)
            seconds[name] += time.perf_counter() - start
            if visit.is_last:
                layer_report = LayerReport(name, tuple(groups), seconds[name], starved)
                report.layers.append(layer_report)
                report.left_out |= _not_reached(context, found[name])
                progress.update()
                progress.set_postfix_str(_progress_text(layer_report, device))
        progress.close()
    return _with_layers_left_out(report, model, is_quantizable)


def _with_layers_left_out(
    report: QuantizationReport, model: nn.Module, is_quantizable: Callable[[str], bool]
) -> QuantizationReport:
    """`report`, and what is said of layers that did not run."""
    ran = {layer.name for layer in report.layers}
    for name, layer in candidate_layers(model).items():
        for part in linears_in(layer) if name not in ran else []:
            if is_quantizable(f"{name}.{part}"):
                report.left_out[f"{name}.{part}"] = "does not run on text alone: not part of the decoder"
    return report


def _context(
    model: nn.Module, name: str, recipe: AwqOffloadConfig, is_quantizable: Callable[[str], bool], undo: Undo | None
) -> LayerContext:
    layer = model.get_submodule(name)
    quantizable = frozenset(part for part in linears_in(layer) if is_quantizable(f"{name}.{part}"))
    return LayerContext(name, layer, quantizable, recipe, undo)


def _run_layer(model: nn.Module, device: torch.device, name: str, use: Callable[[LayerRunner], Any]) -> Any:
    layer = model.get_submodule(name)
    with onloaded(layer, device):
        return use(_runner(layer, device))


def _runner(layer: nn.Module, device: torch.device) -> LayerRunner:
    """Runs an onloaded layer in the dtype that its device is fast in."""
    return LayerRunner(layer, device, compute_dtype(device, next(layer.parameters()).dtype))


def _not_reached(context: LayerContext, structure: LayerStructure) -> dict[str, str]:
    """Linears of the layer that no calibration token reached, and what is said of them."""
    reached = {name for group in structure.groups for name in group.consumers}
    return {f"{context.name}.{name}": "did not run in calibration" for name in context.quantizable - reached}


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
    feed: Feed,
    collector: LayerStatistics,
    device: torch.device,
    counted: list[Tensor | None],  # per batch, the probes included
) -> None:
    """Run the layer over all batches: statistics from those that are data, and its outputs handed on."""
    run = _runner(context.layer, device)
    feed.run_probes(run)
    with collector.collecting():
        for index in range(PROBES, len(counted)):
            collector.count_only(counted[index])
            feed.run(run, context.name, index)


def _quantize_with_statistics(
    context: LayerContext, structure: LayerStructure, statistics: GatheredStatistics
) -> list[GroupReport]:
    """Scales for every group, folded; then clip, round and pack every linear."""
    searched = [
        (group, _search_group_scale(context, group, group_statistics))
        for group in structure.groups
        if (group_statistics := statistics.of_group(group)) is not None
    ]
    row_scales, channel_scales = _fold_scales(context, searched)
    reports = []
    for group, search in searched:
        quantized = tuple(name for name in group.consumers if name in context.quantizable)
        grams: dict[str, tuple[Tensor, FeedbackOrder | None]] = {}  # by whose input it is: experts have their own
        loss = 0.0
        for name in quantized:
            scale = channel_scales.get(name)
            leader = statistics.leader_of[name]
            if leader not in grams:
                own = statistics.of_linear(group, name)
                gram = own.gram if scale is None else own.divided(scale).gram
                grams[leader] = gram, feedback_order(gram) if context.recipe.rounding == "error_feedback" else None
            clip = context.recipe.clip and name not in structure.softmax_only
            loss += _quantize_linear(
                context, name, scale, row_scales.get(name), grams[leader][0], clip, grams[leader][1]
            )
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
    context: LayerContext, searched: list[tuple[InputGroup, ScaleSearch]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fold every winner into its producer; returns what is left to do in fp32 when linears are rounded.

    Returns (row scales, channel scales): per linear, what its output rows (out,) are still to be divided by, and per
    consumer what its input channels (in,) are still to be multiplied by. A producer that will be quantized is not
    touched here: its rows are divided in fp32 on the way to the grid, without a rounding in between.
    """
    row_scales: dict[str, Tensor] = {}
    channel_scales: dict[str, Tensor] = {}
    for group, search in searched:
        if group.fold is None or search.alpha is None:
            continue
        row_scale = search.row_scale
        if group.fold.kind is ProducerKind.ROWS and group.fold.producer in context.quantizable:
            # Two groups may divide different rows of one fused linear.
            row_scales[group.fold.producer] = row_scale * row_scales.get(group.fold.producer, 1.0)
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
        for reader in group.readers:
            _remember(context, [reader.parameter])
            parameter = context.layer.get_parameter(reader.parameter)
            shape = [1] * parameter.ndim
            shape[reader.axis] = -1
            parameter.data.mul_(scale.view(shape))
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
