"""A decoder layer of the shape of Qwen3-30B-A3B's: hidden 2048, 128 experts of 768, 8 of them per token."""

from __future__ import annotations

from transformers import Qwen3MoeConfig

from .made_models import SHAPE_EXPERTS, SHAPE_EXPERTS_SMALL, recipe, with_random_weights
from .quantizing import quantize_and_report
from .recorder import Recorder


def run(recorder: Recorder) -> None:
    shape = SHAPE_EXPERTS_SMALL if recorder.is_small else SHAPE_EXPERTS
    samples, length = (4, 64) if recorder.is_small else (128, 512)
    config = Qwen3MoeConfig(
        num_hidden_layers=1, intermediate_size=shape["moe_intermediate_size"], tie_word_embeddings=False,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, **shape,
    )  # fmt: skip
    source = recorder.folder / "source"
    with_random_weights(config).save_pretrained(source)
    changes = {"min_expert_tokens": 16} if recorder.is_small else {}
    report = quantize_and_report(recorder, source, recipe(shape["vocab_size"], samples, length, **changes))
    experts = sum(".experts." in name for group in report.layers[0].groups for name in group.consumers)
    expected = 3 * shape["num_experts"]
    recorder.check("experts", experts == expected, f"{experts} linears of experts were quantized, not {expected}")
    recorder.details("starved experts", count=len(report.layers[0].starved_experts))
