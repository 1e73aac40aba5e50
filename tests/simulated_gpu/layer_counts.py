"""Counts what quantizing decoder layers of a given shape does on a GPU, phase by phase, beside what `plan()` predicts.

    PYTHONPATH=tests python tests/simulated_gpu/layer_counts.py --hidden 512 --intermediate 1408 --heads 8 --tokens 2048

Kernels, waits, copies and memory are those of a simulated GPU (docs/gpu.md); seconds are not, so there are none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import simulated_gpu

MIB = 2**20
COUNTED = (
    "launches",
    "synchronizations",
    "host_to_device_bytes",
    "pageable_host_to_device_bytes",
    "device_to_host_bytes",
    "flops",
)


@dataclass
class Phase:
    """Sums over the layers, and the highest peaks, of one phase of the loop."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    launches: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    launches_by_line: Counter[str] = field(default_factory=Counter)
    waits_by_line: Counter[str] = field(default_factory=Counter)
    allocated_peak_bytes: int = 0
    reserved_peak_bytes: int = 0


class PhaseCounts:
    """Reads the counters of the simulated GPU around every phase of a run."""

    def __init__(self, by_line: bool = False) -> None:
        self.phases: dict[str, Phase] = {}
        self.by_line = by_line

    @contextmanager
    def watching(self, phase: str) -> Iterator[None]:
        """Adds what happens inside to a phase. Peaks count from what is in use at its beginning."""
        import torch

        from simulated_gpu import observed
        from simulated_gpu.by_line import CountsByLine

        observed.reset_counters()
        torch.cuda.reset_peak_memory_stats()
        lines = CountsByLine()
        try:
            with lines if self.by_line else nullcontext():
                yield
        finally:
            found, counters = self.phases.setdefault(phase, Phase()), observed.counters()
            found.launches_by_line += lines.launches
            found.waits_by_line += lines.waits
            for name in COUNTED:
                found.counts[name] += counters[name]
            for sums, added in (
                (found.launches, observed.launches_by_operation()),
                (found.waits, observed.synchronizations_by_reason()),
            ):
                for name, number in added.items():
                    sums[name] = sums.get(name, 0) + number
            found.allocated_peak_bytes = max(found.allocated_peak_bytes, torch.cuda.max_memory_allocated())
            found.reserved_peak_bytes = max(found.reserved_peak_bytes, torch.cuda.max_memory_reserved())

    @contextmanager
    def of_runs(self) -> Iterator[None]:
        """Watches every phase of runs inside the context; what happens between phases is not counted."""
        from unittest import mock

        from hf_awq_offload.pipeline.run_record import RunRecord

        timed = RunRecord.timed

        @contextmanager
        def watched(record: RunRecord, phase: str, layer: str | None = None) -> Iterator[None]:
            with self.watching(phase), timed(record, phase, layer):
                yield

        with mock.patch.object(RunRecord, "timed", watched):
            yield


def counts(arguments: argparse.Namespace, folder: Path) -> tuple[Any, PhaseCounts]:
    """Returns the plan, and the counts of a run without probing."""
    import torch
    from bench.made import make_checkpoint

    from hf_awq_offload import AwqOffloadConfig, plan, quantize

    shape = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads or arguments.heads,
        "vocab_size": 128,
    }
    source = make_checkpoint(folder / "source", arguments.layers, **shape)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (arguments.tokens // arguments.length, arguments.length), generator=generator).tolist()
    recipe = {"dataset": ids, "n_samples": len(ids), "max_seq_len": arguments.length} | json.loads(arguments.recipe)
    planned = plan(source, AwqOffloadConfig(**recipe), probe=False)
    torch.cuda.empty_cache()
    found = PhaseCounts(by_line=arguments.lines > 0)
    with found.of_runs():
        quantize(source, folder / "out", AwqOffloadConfig(**recipe))
    return planned, found


def report(planned: Any, found: PhaseCounts, operations: int, by_line: int) -> str:
    columns = ("phase", "kernels", "waits", "to the device, MiB", "of it pageable", "to the host, MiB", "GFLOP")
    columns += ("allocated peak, MiB", "reserved peak, MiB")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, phase in found.phases.items():
        counts = phase.counts
        in_mib = [counts[key] / MIB for key in COUNTED[2:5]]
        peaks_mib = [phase.allocated_peak_bytes / MIB, phase.reserved_peak_bytes / MIB]
        numbers = [f"{number:.1f}" for number in (*in_mib, counts["flops"] / 1e9, *peaks_mib)]
        lines.append(
            "| " + " | ".join([name, str(counts["launches"]), str(counts["synchronizations"]), *numbers]) + " |"
        )
    reserved = max(phase.reserved_peak_bytes for phase in found.phases.values())
    allocated = max(phase.allocated_peak_bytes for phase in found.phases.values())
    wanted = planned.accelerator_peak_bytes
    lines += [
        "",
        f"plan(): {wanted / MIB:.1f} MiB in micro-batches of {planned.batch_tokens} tokens; allocated peak "
        f"{allocated / MIB:.1f} MiB ({allocated / wanted:.2f} of it), reserved {reserved / MIB:.1f} MiB "
        f"({reserved / wanted:.2f})",
    ]
    for name, phase in found.phases.items():
        for what, numbers, shown in (
            ("kernels", phase.launches, operations),
            ("waits", phase.waits, operations),
            ("kernels", phase.launches_by_line, by_line),
            ("waits", phase.waits_by_line, by_line),
        ):
            most = sorted(numbers.items(), key=lambda item: -item[1])[:shown]
            lines += (
                [f"{name}, {what}: " + ", ".join(f"{key} {number}" for key, number in most if number)] if most else []
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("intermediate", 1408), ("heads", 8), ("layers", 2), ("tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-heads", type=int, help="by default as many as --heads")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--recipe", default="{}", help='fields of the recipe in JSON, such as {"batch_tokens": 1024}')
    parser.add_argument("--operations", type=int, default=0, help="also name so many operations of each phase")
    parser.add_argument("--lines", type=int, default=0, help="also name so many lines of the package in each phase")
    arguments = parser.parse_args()
    simulated_gpu.add_project_to_path()
    simulated_gpu.start()

    from transformers.utils import logging

    from simulated_gpu import observed, triton_stand_ins

    triton_stand_ins.install()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        print(report(*counts(arguments, Path(scratch)), arguments.operations, arguments.lines))
    for finding in observed.findings():
        print(f"FINDING: {finding}")
    sys.exit(bool(observed.findings()))


if __name__ == "__main__":
    main()
