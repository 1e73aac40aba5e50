"""`hf-awq-offload inspect`: shows what a checkpoint holds and checks it for damage."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from ..checkpoint.inspection import Inspection, inspect_checkpoint
from .checkpoint_folder import checkpoint_folder
from .outcome import DAMAGED, OK, Outcome


def run(options: argparse.Namespace) -> Outcome:
    """Runs the command; the exit code is 3 if there is damage."""
    inspection = inspect_checkpoint(checkpoint_folder(options.checkpoint, options), options.headers_only)
    text = _text(options.checkpoint, inspection, options.headers_only)
    return Outcome(_document(options, inspection), text, DAMAGED if inspection.is_damaged else OK)


def _document(options: argparse.Namespace, inspection: Inspection) -> dict[str, Any]:
    fields = asdict(inspection)
    return {
        "checkpoint": options.checkpoint,
        "headers_only": options.headers_only,
        "damaged": inspection.is_damaged,
        **fields,
    }


def _text(name: str, inspection: Inspection, headers_only: bool) -> str:
    holds = f"{inspection.tensors} tensors in {inspection.files} files, {_mb(inspection.size_bytes)}"
    lines = [f"{name}: {inspection.format}, {holds}"]
    grids = Counter(
        f"{linear.bits} bits, groups of {linear.group_size}, {'asymmetric' if linear.zero_point else 'symmetric'}"
        for linear in inspection.linears
    )
    lines += [f"  {count} linears of {grid}" for grid, count in grids.most_common()]
    lines += [f"  {layer:40}{_mb(size):>12}" for layer, size in inspection.layer_bytes.items()]
    if inspection.linears and not headers_only:
        groups = sum(linear.groups for linear in inspection.linears)
        lines.append(
            f"  of {groups} groups: {sum(linear.zero_scales for linear in inspection.linears)} with a scale of zero, "
            f"{sum(linear.saturated_groups for linear in inspection.linears)} saturated; largest weight "
            f"{max(linear.largest_weight for linear in inspection.linears):.3g}"
        )
    for finding in sorted(inspection.findings, key=lambda finding: not finding.is_damage):
        lines.append(f"{'DAMAGE' if finding.is_damage else 'warning'}: {finding.where}: {finding.what}")
    sound = "no damage found in the headers" if headers_only else "no damage found"
    lines.append("damaged" if inspection.is_damaged else sound)
    return "\n".join(lines)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"
