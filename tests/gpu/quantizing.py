"""Quantizes a checkpoint as a user would, and reports how long each phase took and what memory it took."""

from __future__ import annotations

import statistics
from pathlib import Path

from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig, plan, quantize
from hf_awq_offload.report import QuantizationReport

from .device import GIB, Peak
from .recorder import Recorder

PHASES = ("onload", "structure", "forward", "search")

logging.disable_progress_bar()


def quantize_and_report(recorder: Recorder, source: Path, recipe: AwqOffloadConfig) -> QuantizationReport:
    """Plans and quantizes from disk to disk; the figures bear the part's name."""
    planned = plan(source, recipe, probe=False)
    with Peak() as peak:
        report = quantize(source, recorder.folder / "out", recipe, overwrite=True)
    name, layers = recorder.part, report.layers
    further = layers[1:] or layers
    recorder.figure(f"{name}.first_seconds", layers[0].seconds)
    recorder.figure(f"{name}.layer_seconds", statistics.median(layer.seconds for layer in further))
    for phase in PHASES:
        found = statistics.median(layer.phase_seconds.get(phase, 0.0) for layer in further)
        recorder.figure(f"{name}.{phase}_seconds", found)
    recorder.figure(f"{name}.commit_seconds", report.phase_seconds.get("commit", 0.0) / len(layers))
    recorder.figure(f"{name}.seconds", peak.seconds)
    for what, count_bytes in (
        ("planned", planned.accelerator_peak_bytes),
        ("allocated", peak.allocated_bytes),
        ("reserved", peak.reserved_bytes),
    ):
        recorder.figure(f"{name}.{what}_gib", count_bytes / GIB)
    recorder.details(
        "quantized",
        layers=len(layers),
        tokens=report.tokens,
        batch_tokens=planned.batch_tokens,
        run_phase_seconds=report.phase_seconds,
        layer_seconds=[layer.seconds for layer in layers],
        first_layer_phase_seconds=layers[0].phase_seconds,
        loss_of_nearest=[layer.loss / max(layer.loss_nearest, 1e-30) for layer in layers],
        folded=[sum(group.producer is not None for group in layer.groups) for layer in layers],
    )
    worse = [layer.name for layer in layers if not layer.loss <= layer.loss_nearest * 1.0001]
    recorder.check(name, not worse, f"these layers are worse than rounded to nearest: {worse}")
    left_out = sorted(set(report.left_out) - {"lm_head"})
    recorder.check(name, not left_out, f"linears were left out: {left_out}")
    return report
