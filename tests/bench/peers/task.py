"""What a quantizer is asked for, and what is measured while it works; imports nothing but torch.

A script of this folder runs in the environment of one tool:  python <tool>_quantizes.py MODEL TOKENS OUT
TOKENS is a JSON list of sequences of token ids; the quantized checkpoint goes to OUT, measurements are the last line of
the standard output. The environment variable BITS says how many bits. The clock starts when the model is in memory and
stops before it is saved.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

GROUP_SIZE = 128
BITS = int(os.environ["BITS"])


def run(load: Callable[[str], object], quantize: Callable[..., object], save: Callable[..., None]) -> None:
    """`load(model) -> loaded`, `quantize(loaded, sequences) -> quantized`, `save(quantized, out)`."""
    model, tokens, out = sys.argv[1:]
    sequences = json.loads(Path(tokens).read_text(encoding="utf-8"))
    loaded = load(model)
    wall, processor = time.perf_counter(), time.process_time()
    quantized = quantize(loaded, sequences)
    seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save(quantized, out)
    measured = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": peak_bytes}
    print(json.dumps(measured | {"torch": torch.__version__}))
