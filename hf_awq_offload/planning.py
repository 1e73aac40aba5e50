"""`plan` predicts the memory, disk space and time of a quantization.

It takes two steps. The first reads headers only and compares the sizes of layers, hidden states and files with the
free memory and disk space; a run that can't fit is refused here. The second, the probe, quantizes the first two layers
on two micro-batches, discards them, and scales what it measured to all tokens and layers.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .calibration.dataset import CalibrationSet, micro_batches
from .config import AwqOffloadConfig, require_recipe
from .errors import MemoryLimitError
from .integrations.lazy_loading import detach_stored_weights, load_on_meta, to_checkpoint_names
from .integrations.one_at_a_time import one_at_a_time
from .integrations.quantizer import AwqOffloadQuantizer
from .integrations.registration import register
from .messages import size_text
from .model.decoder_layers import candidate_layers
from .model.fused_experts import fused_experts_of
from .offload.devices import accelerator_bytes
from .offload.memory_use import MemoryMeter
from .offload.stored_weights import StoredWeights
from .pipeline.budget import PROCESS_BYTES, budget_of, hidden_bytes
from .pipeline.layer_sizes import LayerSizes, parameter_bytes
from .pipeline.loop import quantize_layers
from .pipeline.run_storage import execution_device, free_ram_bytes
from .report import Plan

PROBE_LAYERS = 2
"""The first layer's structure is probed; the second is like all that follow."""
PROBE_BATCHES = 2
HIDDEN_FILES = 3
"""Hidden states on the disk at once: of two commits, and those being written. A kept journal's thread is one behind."""
CUDA_CONTEXT_BYTES = 512 << 20
"""RAM that CUDA's libraries take once a device is used: an estimate, until a card has measured it (docs/gpu.md)."""


@one_at_a_time()
def plan(
    src: str | os.PathLike[str],
    config: AwqOffloadConfig,
    *,
    probe: bool = True,
    max_memory: Mapping[str, int | str] | None = None,
    model_class: Any = AutoModelForCausalLM,
    dtype: Any = "auto",
    **kwargs: Any,
) -> Plan:
    """Predicts what `quantize(src, ..., config)` will need.

    Args:
        src: name or folder of a full-precision checkpoint in safetensors files.
        config: the recipe.
        probe: quantize two layers on two micro-batches to measure; without it, sizes are estimated from the files'
            headers alone, and the time is not predicted.
        max_memory: device -> bytes or "8GiB"; by default `config.max_memory`.
        model_class: the Auto class that loads the model.
        dtype: the model's dtype; "auto" is the checkpoint's.
        kwargs: passed to `from_pretrained`.

    Raises:
        MemoryLimitError: the run does not fit into memory or on the disk; the message says which fields to change.
        AwqOffloadError: the model can't be quantized, or the data can't be used.
    """
    register()
    start = time.perf_counter()
    recipe = streamed_recipe(config, max_memory=max_memory)
    is_kept = recipe.checkpoint_dir is not None
    recipe.checkpoint_dir = recipe.report_dir = None
    meter = MemoryMeter(execution_device(recipe))
    with tempfile.TemporaryDirectory(prefix="hf_awq_offload-") as scratch:
        model = load_on_meta(src, recipe, model_class, dtype, Path(scratch) / "converted", kwargs)
        first_look = estimate(model, is_kept)
        require_fit(first_look, recipe, Path(scratch))
        if not probe:
            return first_look
        return _probed(model, first_look, meter, Path(scratch), start, is_kept)


def streamed_recipe(config: AwqOffloadConfig, **changes: Any) -> AwqOffloadConfig:
    """Returns a copy of `config` that reads weights from disk, with those of `changes` applied that are not None."""
    require_recipe(config)
    recipe = copy.copy(config)
    recipe.offload = "disk"
    recipe.update(**{name: value for name, value in changes.items() if value is not None})
    return recipe


def estimate(model: PreTrainedModel, is_kept: bool) -> Plan:
    """Estimates a plan from sizes alone; `model` is on the meta device, its quantizer holds recipe and data.

    `is_kept` says whether the journal is for a later run.
    """
    preparation, mtp = _quantizer(model).preparation, _quantizer(model).source.mtp
    recipe, calibration = preparation.recipe, preparation.calibration
    device = execution_device(recipe)
    layers = candidate_layers(model).values()
    layer_sizes, sizes = LayerSizes.of(layers, device), _Sizes.of(model)
    budget = budget_of(model, recipe, device, calibration)
    hidden = hidden_bytes(model, calibration)
    beside_bytes = budget.peak_bytes
    if device.type != "cpu":
        beside_bytes = layer_sizes.weights + (layer_sizes.pinned if budget.prefetch else 0)
        beside_bytes += layer_sizes.statistics if budget.statistics_device != device else 0
        beside_bytes += CUDA_CONTEXT_BYTES if device.type == "cuda" else 0
    entering_bytes = sizes.outside
    if mtp is not None:  # what enters it is computed beside its prefetched weights and the hidden states that are given
        entering_bytes += layer_sizes.weights * budget.prefetch + hidden
    return Plan(
        device=str(device),
        layers=len(layers),
        tokens=0 if calibration is None else calibration.tokens,
        batch_tokens=budget.batch_tokens,
        accelerator_peak_bytes=0 if device.type == "cpu" else budget.peak_bytes,
        ram_peak_bytes=PROCESS_BYTES + max(beside_bytes, entering_bytes) + hidden,
        disk_bytes=sizes.quantized_layers
        + max(min(HIDDEN_FILES + is_kept, len(layers) - 1) * hidden, sizes.result + hidden),
        seconds=None,
    )


def require_fit(wanted: Plan, recipe: AwqOffloadConfig, folder: Path) -> None:
    """Checks that there is room for `wanted`; `folder` is on the disk that is written to.

    Disk space that the journal takes already is not needed again.

    Raises:
        MemoryLimitError: RAM, disk space or accelerator memory is too small.
    """
    journal = Path(recipe.checkpoint_dir) if recipe.checkpoint_dir is not None else folder / "none"
    there_bytes = sum(path.stat().st_size for path in journal.glob("*")) if journal.is_dir() else 0
    device = torch.device(wanted.device)
    checks = [
        ("RAM", wanted.ram_peak_bytes, free_ram_bytes(recipe), "'cpu'"),
        ("disk space", wanted.disk_bytes - there_bytes, shutil.disk_usage(folder).free, None),
    ]
    if device.type != "cpu":
        limit = recipe.memory_limit_bytes(device)
        free_bytes, _ = accelerator_bytes(device)
        available = free_bytes if limit is None else min(limit, free_bytes)
        checks.append(("accelerator memory", wanted.accelerator_peak_bytes, available, repr(str(device))))
    for what, needed, available, key in checks:
        if needed <= available:
            continue
        knobs = "n_samples or max_seq_len lower (hidden states), batch_tokens lower (activations), prefetch=False"
        raise MemoryLimitError(
            f"Quantizing takes about {size_text(needed)} of {what}, but {size_text(available)} are available"
            + (f" or allowed by max_memory[{key}]" if key else "")
            + f". Planned: {wanted}. Set {knobs}{f', or raise max_memory[{key}]' if key else ', or make room'}."
        )


def _probed(
    model: PreTrainedModel, first_look: Plan, meter: MemoryMeter, scratch: Path, start: float, is_kept: bool
) -> Plan:
    """Quantizes the first layers on the first micro-batches and returns the plan; planning began at `start`."""
    quantizer = _quantizer(model)
    everything = quantizer.preparation.calibration
    part = None if everything is None else _first_batches(everything, first_look.batch_tokens)
    quantizer.restrict(part, checkpoint_dir=scratch / "journal", batch_tokens=first_look.batch_tokens)
    weights = detach_stored_weights(model, quantizer.source.opened)
    sizes = _Sizes.of(model)
    to_checkpoint = to_checkpoint_names(model)
    with closing(quantizer.prepare(model, weights, to_checkpoint, is_kept=is_kept)) as storage:
        preparing = time.perf_counter() - start
        is_quantizable = quantizer.preparation.quantizable.__contains__
        report = quantize_layers(model, quantizer.recipe, storage, is_quantizable, part, most_layers=PROBE_LAYERS)
    ram_bytes, accelerator_bytes = meter.peak_bytes()
    # At the end, tensors outside the layers whose dtype changes are written one by one, each from a copy.
    at_the_end = meter.now_bytes() + 2 * _largest_converted_bytes(model, weights)
    share = 1.0 if part is None or everything is None else everything.tokens / part.tokens
    more_hidden = int(hidden_bytes(model, everything) * (1 - 1 / share))
    run = report.phase_seconds
    forward = run.get("forward", 0.0) / len(report.layers)
    commit = run.get("commit", 0.0) / len(report.layers)
    per_layer = report.layers[-1].seconds - forward + forward * share + commit
    first = report.layers[0].seconds - forward + forward * share + commit
    writing = commit * first_look.layers * sizes.result / sizes.quantized_layers
    seconds = preparing + run.get("skeleton", 0.0) * share + first + per_layer * (first_look.layers - 1) + writing
    return replace(
        first_look,
        ram_peak_bytes=max((ram_bytes or first_look.ram_peak_bytes) + more_hidden, at_the_end),
        accelerator_peak_bytes=accelerator_bytes,
        seconds=seconds,
    )


def _first_batches(calibration: CalibrationSet, batch_tokens: int) -> CalibrationSet:
    chosen = [index for batch in micro_batches(calibration, batch_tokens)[:PROBE_BATCHES] for index in batch]
    return replace(
        calibration,
        sequences=[calibration.sequences[index] for index in chosen],
        counted=[calibration.counted[index] for index in chosen],
        samples=calibration.samples[:PROBE_BATCHES],
    )


def _largest_converted_bytes(model: PreTrainedModel, weights: StoredWeights) -> int:
    inside = {id(parameter) for layer in candidate_layers(model).values() for parameter in layer.parameters()}
    outside = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
    sizes = [p.numel() * p.element_size() for name, p in outside.items() if not weights.is_as_stored(name)]
    return max(sizes, default=0)


def _quantizer(model: PreTrainedModel) -> AwqOffloadQuantizer:
    return cast(AwqOffloadQuantizer, cast(Any, model).hf_quantizer)


@dataclass(frozen=True)
class _Sizes:
    """Sizes in bytes, beside those of single decoder layers."""

    outside: int
    """Weights outside the decoder layers, such as embeddings."""
    quantized_layers: int
    """Quantized layers in the files of the journal."""
    result: int
    """Weights in the files of the new checkpoint."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Sizes:
        layers = list(candidate_layers(model).values())
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        fused = {f"{name}.{key}" for name, experts in fused_experts_of(model).items() for key in experts.matrices}
        stored = {
            id(parameter): parameter.numel() * _stored_element_bytes(model, name, parameter, name in fused)
            for name, parameter in model.named_parameters()
        }
        return cls(
            outside=parameter_bytes(getattr(model, "base_model", model)) - sum(map(parameter_bytes, layers)),
            quantized_layers=int(sum(size for key, size in stored.items() if key in in_layers)),
            result=int(sum(stored.values())),
        )


def _stored_element_bytes(model: PreTrainedModel, name: str, parameter: nn.Parameter, is_fused: bool) -> float:
    """Returns the bytes per element in the new checkpoint; experts that are still fused are quantized one by one."""
    preparation = _quantizer(model).preparation
    if is_fused:
        return preparation.quantized_element_bytes(name, parameter)
    return preparation.element_bytes(name, parameter)
