"""A decoder layer of a 70B (hidden 8192, intermediate 28672, 8 of 64 key heads), 128 × 512 tokens, default recipe."""

from __future__ import annotations

from .made_models import SHAPE_70B, SHAPE_SMALL, recipe, write_llama
from .quantizing import quantize_and_report
from .recorder import Recorder


def run(recorder: Recorder) -> None:
    shape = SHAPE_SMALL | {"num_key_value_heads": 1} if recorder.is_small else SHAPE_70B
    samples, length = (4, 64) if recorder.is_small else (128, 512)
    source = write_llama(recorder.folder / "source", 1, shape)
    quantize_and_report(recorder, source, recipe(shape["vocab_size"], samples, length))
