"""report.json: a run as JSON values. report.schema.json beside this file is its schema, docs/report.md explains it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..config import AwqOffloadConfig
from ..report import LayerReport, Plan, QuantizationReport
from ..search.clip import STEP, STEPS
from .families import Family

SCHEMA_VERSION = 1
"""Raised when a field is removed or changes its meaning; adding fields does not raise it."""

CLIP_RATIOS = [round(1 - step * STEP, 10) for step in range(STEPS)]


@dataclass(frozen=True)
class RunFacts:
    """What a report says about the run as a whole, beside the records of its layers."""

    model: str  # name on the Hub, or name of a folder
    device: str  # the execution device
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    plan: Mapping[str, Any] | None = None  # fields of `Plan`, where one was made


def facts_of(
    source: str | None,  # a name on the Hub, or a path
    device: torch.device,
    recipe: AwqOffloadConfig,
    meta: Mapping[str, Any],  # how the checkpoint was made, as its config.json says
    plan: Plan | None = None,
) -> RunFacts:
    """Collects the facts of a run; a path is reduced to its last part, so that a report names no private folders."""
    source = source or "a model"
    model = Path(source).name if os.path.exists(source) else source
    chosen = ("overrides", "min_expert_tokens", "all_experts", "offload")
    settings = (
        {"format": recipe.checkpoint_format}
        | recipe.base_choice._asdict()
        | {name: getattr(recipe, name) for name in chosen}
    )
    kept = {key: value for key, value in meta.items() if key != "quantizer"}
    return RunFacts(model, str(device), settings | kept, None if plan is None else asdict(plan))


def document_of(report: QuantizationReport, facts: RunFacts) -> dict[str, Any]:
    """Returns the content of report.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quantizer": f"hf_awq_offload {version('hf_awq_offload')}",
        "model": facts.model,
        "device": facts.device,
        "settings": dict(facts.settings),
        "plan": None if facts.plan is None else dict(facts.plan),
        "summary": summary_of(report),
        "phase_seconds": report.phase_seconds,
        "clip_ratios": CLIP_RATIOS,
        "layers": [_layer(layer) for layer in report.layers],
        "left_out": report.left_out,
    }


def summary_of(report: QuantizationReport) -> dict[str, Any]:
    """Returns the figures of the whole run, None where a figure is not known."""
    everything = Family(tuple(group for layer in report.layers for group in layer.groups))
    identity = sum(everything.reasons.values())
    memory = [layer.memory for layer in report.layers if layer.memory is not None]
    counts = everything.clip_counts
    return {
        "layers": len(report.layers),
        "groups": len(everything.groups),
        "linears": sum(len(group.consumers) for group in everything.groups),
        "calibration_tokens": report.tokens,
        "loss_nearest": everything.loss_nearest,
        "loss_scaled": everything.loss_scaled,
        "loss": everything.loss,
        "loss_ratio": _share(everything.loss, everything.loss_nearest),
        "loss_caveat": report.loss_caveat,
        "few_token_groups": sum(group.has_few_tokens for group in everything.groups),
        "identity_groups": identity,
        "identity_share": _share(identity, len(everything.groups)),
        "identity_reasons": everything.reasons,
        "clip_counts": counts,
        "clip_ratio_mean": _share(sum(n * ratio for n, ratio in zip(counts, CLIP_RATIOS, strict=False)), sum(counts)),
        "rows": everything.rows,
        "rows_nearest": everything.rows_nearest,
        "seconds": sum(layer.seconds for layer in report.layers),
        "ram_peak_bytes": max((use.ram_peak for use in memory), default=None),
        "accelerator_peak_bytes": max((use.accelerator_peak for use in memory), default=None),
        "starved_experts": sum(len(layer.starved_experts) for layer in report.layers),
        "left_out": len(report.left_out),
    }


def _layer(layer: LayerReport) -> dict[str, Any]:
    everything = Family(layer.groups)
    fields = asdict(layer)
    groups = fields.pop("groups")
    losses = {
        "loss_nearest": everything.loss_nearest, "loss_scaled": everything.loss_scaled, "loss": everything.loss
    }  # fmt: skip
    return fields | losses | {"groups": groups}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
