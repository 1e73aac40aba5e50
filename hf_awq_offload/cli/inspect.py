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
    found = inspect_checkpoint(checkpoint_folder(options.checkpoint, options.revision), options.headers_only)
    text = _text(options.checkpoint, found, options.headers_only)
    return Outcome(_document(options, found), text, DAMAGED if found.is_damaged else OK)


def _document(options: argparse.Namespace, found: Inspection) -> dict[str, Any]:
    fields = asdict(found)
    return {
        "checkpoint": options.checkpoint,
        "headers_only": options.headers_only,
        "damaged": found.is_damaged,
        **fields,
    }


def _text(name: str, found: Inspection, headers_only: bool) -> str:
    lines = [f"{name}: {found.format}, {found.tensors} tensors in {found.files} files, {_mb(found.size_bytes)}"]
    grids = Counter(
        f"{linear.bits} bits, groups of {linear.group_size}, {'asymmetric' if linear.zero_point else 'symmetric'}"
        for linear in found.linears
    )
    lines += [f"  {count} linears of {grid}" for grid, count in grids.most_common()]
    lines += [f"  {layer:40}{_mb(size):>12}" for layer, size in found.layer_bytes.items()]
    if found.linears and not headers_only:
        groups = sum(linear.groups for linear in found.linears)
        lines.append(
            f"  of {groups} groups: {sum(linear.zero_scales for linear in found.linears)} with a scale of zero, "
            f"{sum(linear.saturated_groups for linear in found.linears)} saturated; largest weight "
            f"{max(linear.largest_weight for linear in found.linears):.3g}"
        )
    for finding in sorted(found.findings, key=lambda each: not each.is_damage):
        lines.append(f"{'DAMAGE' if finding.is_damage else 'warning'}: {finding.where}: {finding.what}")
    lines.append("damaged" if found.is_damaged else "no damage found" + (" in the headers" if headers_only else ""))
    return "\n".join(lines)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"
