"""`hf-awq-offload convert`: converts a quantized checkpoint to another format, exactly."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from ..checkpoint.conversion import convert_checkpoint
from .checkpoint_folder import checkpoint_folder
from .outcome import Outcome


def run(options: argparse.Namespace) -> Outcome:
    """Runs the command; a conversion that fails leaves nothing behind."""
    source = checkpoint_folder(options.source, options)
    scale_dtype = getattr(torch, options.scale_dtype) if options.scale_dtype else None
    done = convert_checkpoint(
        source, Path(options.out), options.to, scale_dtype=scale_dtype, overwrite=options.overwrite
    )
    document = {"source": options.source, "out": options.out, **asdict(done)}
    formats = f"{done.linears} linears from {done.source_format} to {done.format}"
    return Outcome(document, f"{options.out}: {formats}, {done.size_bytes / 1e6:.1f} MB")
