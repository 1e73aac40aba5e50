"""Four decoder layers of a 7B (hidden 4096, intermediate 11008), 128 × 512 tokens, the default recipe, disk to disk."""

from __future__ import annotations

from .made_models import SHAPE_7B, SHAPE_SMALL, recipe, write_llama
from .quantizing import quantize_and_report
from .recorder import Recorder


def run(recorder: Recorder) -> None:
    shape = SHAPE_SMALL if recorder.is_small else SHAPE_7B
    layers, samples, length = (2, 4, 64) if recorder.is_small else (4, 128, 512)
    source = write_llama(recorder.folder / "source", layers, shape)
    quantize_and_report(recorder, source, recipe(shape["vocab_size"], samples, length))
