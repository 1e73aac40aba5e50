"""Models that run one decoder layer at a time give the figures that they give whole, whatever kind they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import tiny_llava
from models import save_model, tiny_gemma2, tiny_gpt_oss, tiny_llama, tiny_mixtral, token_batch, token_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    PreTrainedModel,
)

from hf_awq_offload import evaluate, quantize
from hf_awq_offload.reporting.evaluation import Evaluation

TEXT = token_batch(1, 90, seed=5)[0]
WINDOWS = {"dataset": TEXT, "window_tokens": 24, "stride_tokens": 16, "batch_tokens": 48}
"""Windows of two lengths, the first with more scored tokens than the others, in micro-batches of two."""


def tiny_gemma3n() -> PreTrainedModel:
    """A model whose layers form no chain: its forward passes are paused at each layer."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=[96] * 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * 4,
        initializer_range=0.1,
    )
    return Gemma3nForCausalLM(config).eval()


def quantized(folder: Path, target: Path, **changes: Any) -> Path:
    """Quantizes in few steps, by rounding to nearest: how well does not matter here."""
    model_class = changes.pop("model_class", AutoModelForCausalLM)
    recipe = token_recipe(**{"n_grid": 0, "clip": False, "rounding": "nearest"} | changes)
    quantize(folder, target, recipe, model_class=model_class)
    return target


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama, tied": (lambda: tiny_llama(tie_word_embeddings=True), {}),
    "scales that differ by 3-bit overrides": (tiny_llama, {"bits": 8, "overrides": {"down_proj": {"bits": 3}}}),
    "experts stored one by one": (tiny_mixtral, {}),
    "experts stored fused": (tiny_gpt_oss, {"format": "compressed-tensors"}),
    "soft caps and sliding windows": (tiny_gemma2, {}),
    "paused forward passes": (tiny_gemma3n, {}),
    "image and text": (tiny_llava, {"model_class": AutoModelForImageTextToText}),
}


def assert_equal(streamed: Evaluation, whole: Evaluation) -> None:
    assert streamed.streamed
    assert not whole.streamed
    assert streamed.tokens == whole.tokens == len(TEXT) - 1
    assert streamed.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert streamed.reference_perplexity == pytest.approx(whole.reference_perplexity, rel=1e-5)
    assert whole.kl_nats > 1e-6
    assert streamed.kl_nats == pytest.approx(whole.kl_nats, rel=1e-3)
    assert streamed.top1_agreement == pytest.approx(whole.top1_agreement, abs=1.5 / len(TEXT))
    assert [bucket.tokens for bucket in streamed.positions] == [bucket.tokens for bucket in whole.positions]
    for bucket, expected in zip(streamed.positions, whole.positions, strict=True):
        assert bucket.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_layer_by_layer_is_as_whole(kind, tmp_path):
    build, changes = MODELS[kind]
    source = save_model(build(), tmp_path / "source")
    out = quantized(source, tmp_path / "out", **changes)
    loading = {"model_class": changes.get("model_class", AutoModelForCausalLM), "device_map": "cpu"}
    whole = evaluate(out, against=source, streamed=False, **WINDOWS, **loading)
    streamed = evaluate(out, against=source, streamed=True, **WINDOWS, **loading)
    assert_equal(streamed, whole)
    assert [layer.name for layer in streamed.layers] == [layer.name for layer in streamed.layers if layer.name]
    assert len(streamed.layers) >= 2
    assert all(0 < layer.relative_error < 1 for layer in streamed.layers)
