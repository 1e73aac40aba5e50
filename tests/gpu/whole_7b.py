"""All 32 decoder layers of a 7B, 128 × 512 tokens, the default recipe, from disk to disk; all have the same weights."""

from __future__ import annotations

import shutil

from .device import GIB
from .made_models import SHAPE_7B, SHAPE_SMALL, recipe, write_llama
from .quantizing import quantize_and_report
from .recorder import NotRunError, Recorder

NEEDED_GIB = 24
"""The checkpoint in bf16, the journal, the result, and some air."""


def run(recorder: Recorder) -> None:
    shape = SHAPE_SMALL if recorder.is_small else SHAPE_7B
    layers, samples, length = (3, 4, 64) if recorder.is_small else (32, 128, 512)
    free_gib = shutil.disk_usage(recorder.folder).free / GIB
    if not recorder.is_small and free_gib < NEEDED_GIB:
        raise NotRunError(f"{recorder.folder} has {free_gib:.0f} GiB free, it takes {NEEDED_GIB} (set TMPDIR)")
    source = write_llama(recorder.folder / "source", layers, shape, repeats_one=True)
    recorder.details("made", seconds_left=round(recorder.seconds_left()))
    quantize_and_report(recorder, source, recipe(shape["vocab_size"], samples, length))
