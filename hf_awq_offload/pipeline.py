"""The one loop: decoder layer by decoder layer, from calibration data to packed weights.

    skeleton pass (what each layer is given) -> for each layer: onload, statistics, scales, clip, round, pack, offload

What happens on one layer is in `layer_quantization.py`; this file says in which order, on which data, and where.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .config import AwqOffloadConfig
from .data import CalibrationSet, micro_batches
from .feeds import PROBES, Feed, layers_that_run, open_feed
from .folds import LayerStructure, structure_key, without_folds_of
from .gathering import LayerStatistics
from .layer_quantization import LayerContext, Undo, quantize_with_statistics, quantize_without_data
from .layers import LayerRunner, calibration_mode, candidate_layers, shared_parameters
from .linears import linears_in
from .probing import ProbeCalls, discover_structure, provable_structure
from .report import LayerReport, QuantizationReport
from .streaming import compute_dtype, onloaded, peak_memory_bytes

PROBE_TOKENS = 32
CPU_BATCH_TOKENS = 4096
"""Micro-batch on a CPU: large enough for full-speed matrix products, small beside any model."""
ACCELERATOR_MEMORY_SHARE = 0.25
"""Share of the accelerator's free memory that a micro-batch's activations may take."""


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
                report.layers.append(LayerReport(name, tuple(quantize_without_data(context)), 0.0))
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
                    groups = quantize_with_statistics(context, found[name], statistics)
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


def _progress_text(report: LayerReport, device: torch.device) -> str:
    """Layer name, loss before → after, and the peak memory so far (the accelerator's, or the process's)."""
    peak_bytes = peak_memory_bytes(device)
    return f"{report.name} loss {report.loss_nearest:.3g} → {report.loss:.3g}, peak {peak_bytes / 2**30:.2f} GiB"
