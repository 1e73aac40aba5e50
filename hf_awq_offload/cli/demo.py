"""`hf-awq-offload demo`: what `make demo` shows."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from .. import demo
from .outcome import Outcome


def run(options: argparse.Namespace) -> Outcome:
    """The demo prints its table while it runs; the document has the same rows."""
    torch.manual_seed(0)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(options.out) if options.out else Path(scratch) / "tiny-llama-awq"
        rows = demo.run(out, Path(scratch) / "tiny-llama-rtn", not options.no_speed)
    return Outcome({"out": options.out, "rows": [asdict(row) for row in rows]}, text="")
