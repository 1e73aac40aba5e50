"""Quality on the model that ships with the package, compared with rounding to nearest and with AWQ as published.

Measured in fp32 on held-out text, as the mean KL divergence of the next-token distributions from the full-precision
model. Both quantizers get the same calibration tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references.block_search import quantize_by_block_search
from references.metrics import compute_logits, kl_divergence, perplexity
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.calibration.dataset import load_calibration_set
from hf_awq_offload.nn.quantized_linear import QuantizedLinear

RECIPE = {"bits": 4, "group_size": 128, "n_samples": 48, "max_seq_len": 512, "rounding": "nearest"}
SEQ_LEN = 512
BATCH = 8
HELDOUT_SEQUENCES = 48
MIN_HELDOUT_TOKENS = 16_384

# Models are made once per module, so its tests stay on one worker.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality")]


@pytest.fixture(scope="module")
def full(tiny_llama_dir) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def heldout(tiny_llama_dir) -> list[Tensor]:
    """Held-out text as batches of (8, 512) token ids."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = (tiny_llama_dir / "heldout.txt").read_text(encoding="utf-8")
    token_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    sequences = token_ids[: token_ids.numel() // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)[:HELDOUT_SEQUENCES]
    assert sequences.numel() >= MIN_HELDOUT_TOKENS
    return list(sequences.split(BATCH))


@pytest.fixture(scope="module")
def full_logits(full, heldout) -> list[Tensor]:
    return compute_logits(full, heldout)


@pytest.fixture(scope="module")
def awq(tiny_llama_dir) -> PreTrainedModel:
    return _quantize(tiny_llama_dir)


@pytest.fixture(scope="module")
def awq_kl(awq, full_logits, heldout) -> float:
    return kl_divergence(awq, full_logits, heldout)


@pytest.fixture(scope="module")
def nearest_kl(tiny_llama_dir, full_logits, heldout) -> float:
    return kl_divergence(_quantize(tiny_llama_dir, n_grid=0, clip=False), full_logits, heldout)


def test_awq_halves_the_divergence_of_round_to_nearest(awq_kl, nearest_kl):
    print(f"KL in nats per token: round to nearest {nearest_kl:.5f}, AWQ {awq_kl:.5f}")
    assert awq_kl <= 0.5 * nearest_kl


def test_no_worse_than_the_search_by_block_output(tiny_llama_dir, full, awq_kl, nearest_kl, full_logits, heldout):
    calibration = load_calibration_set(
        AwqOffloadConfig(**RECIPE),
        load_tokenizer=lambda: AutoTokenizer.from_pretrained(tiny_llama_dir),
        vocab_size=full.config.vocab_size,
    )
    assert calibration.tokens == RECIPE["n_samples"] * RECIPE["max_seq_len"]
    batches = list(torch.stack(calibration.sequences).split(BATCH))
    reference_kl = kl_divergence(quantize_by_block_search(full, batches), full_logits, heldout)
    print(f"KL in nats per token: search by block output {reference_kl:.5f}, AWQ {awq_kl:.5f}")
    assert reference_kl <= 0.5 * nearest_kl, "the reference itself is broken"
    assert awq_kl <= 1.1 * reference_kl


def test_error_feedback_more_than_halves_what_is_left(tiny_llama_dir, awq_kl, full_logits, heldout):
    feedback_kl = kl_divergence(_quantize(tiny_llama_dir, rounding="error_feedback"), full_logits, heldout)
    print(f"KL in nats per token: AWQ to the nearest {awq_kl:.5f}, with error feedback {feedback_kl:.5f}")
    assert feedback_kl <= 0.5 * awq_kl


def test_perplexity_is_nearly_that_of_full_precision(full, awq, heldout):
    full_perplexity, awq_perplexity = perplexity(full, heldout), perplexity(awq, heldout)
    print(f"perplexity: full precision {full_perplexity:.3f}, AWQ {awq_perplexity:.3f}")
    assert awq_perplexity <= 1.02 * full_perplexity


def test_more_bits_are_closer_to_full_precision(tiny_llama_dir, awq_kl, full_logits, heldout):
    recipes = {
        "2": {"bits": 2},
        "3": {"bits": 3},
        "4 in compressed-tensors": {"format": "compressed-tensors"},
        "4, down_proj 8": {"overrides": {"down_proj$": {"bits": 8}}},
        "8": {"bits": 8},
    }
    kl = {
        bits: kl_divergence(_quantize(tiny_llama_dir, **fields), full_logits, heldout)
        for bits, fields in recipes.items()
    }
    print(f"KL in nats per token: {', '.join(f'{bits} bits {value:.6f}' for bits, value in kl.items())}")
    values = list(kl.values())
    assert values == sorted(values, reverse=True)
    assert kl["8"] < 0.05 * kl["4 in compressed-tensors"]
    # The same integers as in the AWQ format, computed by other kernels.
    assert kl["4 in compressed-tensors"] == pytest.approx(awq_kl, rel=0.05)


def _quantize(directory: Path, **changes) -> PreTrainedModel:
    config = AwqOffloadConfig(**{**RECIPE, **changes})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config)
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(isinstance(linear, QuantizedLinear) for linear in linears)
    return model
