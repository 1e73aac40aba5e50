"""Makes up reports of models that are too large to quantize in a test."""

from __future__ import annotations

import math
import random

from hf_awq_offload.pipeline.scaling import NO_BETTER, NO_PRODUCER
from hf_awq_offload.report import GroupReport, LayerReport, MemoryUse, QuantizationReport
from hf_awq_offload.reporting.document import RunFacts

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEAR_ATTENTION = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
PLAN = {
    "device": "cpu", "layers": 32, "tokens": 65536, "batch_tokens": 4096, "accelerator_peak_bytes": 0,
    "ram_peak_bytes": 5 << 29, "disk_bytes": 8 << 30, "seconds": 200.0,
}  # fmt: skip


def facts(plan: dict | None = None) -> RunFacts:
    settings = {"format": "awq", "bits": 4, "group_size": 128, "min_expert_tokens": 256}
    return RunFacts("org/model", "cpu", settings, plan)


def sample(layers: int, experts: int = 0, groups: int = 4, more_names: tuple[str, ...] = ()) -> QuantizationReport:
    """Returns a report of `layers` layers, with four or eight groups each, or those of a mixture of experts."""
    rng = random.Random(0)
    found = []
    for index in range(layers):
        names: list[tuple[str, ...]] = [ATTENTION, ("self_attn.o_proj",)]
        if experts:
            each = range(experts)
            names.append(tuple(f"mlp.experts.{e}.{p}" for e in each for p in ("gate_proj", "up_proj")))
            names += [(f"mlp.experts.{e}.down_proj",) for e in each]
        else:
            names += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
        if groups == 8:
            names += [LINEAR_ATTENTION, ("linear_attn.out_proj",), ("self_attn.indexer.wq_b",), ("mlp.extra_proj",)]
        names += [(name,) for name in more_names]
        phases = {"onload": 0.2, "structure": 4.0 if index == 0 else 0.2, "forward": 1.2, "search": rng.uniform(4, 6)}
        gib = 2**30
        memory = MemoryUse(gib, gib + min(index, 5) * gib // 50, gib // 10 if experts else 0, 6 * gib if experts else 0)
        starved = {f"mlp.experts.{e}": rng.randrange(256) for e in range(experts) if rng.random() < 0.3}
        own = tuple(group(each, rng, index) for each in names)
        found.append(LayerReport(f"model.layers.{index}", own, sum(phases.values()), starved, phases, memory))
    left_out = {"lm_head": "tied"} | {f"model.layers.{n}.mlp.gate": "chooses experts" for n in range(layers)}
    return QuantizationReport(found, left_out, tokens=65536, phase_seconds={"skeleton": 12.0})


def group(names: tuple[str, ...], rng: random.Random, layer: int) -> GroupReport:
    nearest = math.exp(layer * 0.04 + rng.gauss(0, 0.25))
    scaled = nearest * rng.uniform(0.6, 0.95)
    has_producer = "out_proj" not in names[0]
    alpha = rng.randrange(20) / 20 if has_producer and rng.random() > 0.1 else None
    counts = tuple(int(4000 * math.exp(-0.7 * step)) for step in range(10))
    return GroupReport(
        names, "norm" if has_producer else None, alpha, nearest, scaled * rng.uniform(0.3, 0.5),
        None if alpha is not None else NO_BETTER if has_producer else NO_PRODUCER, scaled, 4096, 40, counts,
    )  # fmt: skip
