"""Measures what changes a result that should not: micro-batches and threads; asserts what has to be exact.

    python tests/bench/determinism.py [--samples 32]

Quantizes the shipped model with each setting, and compares with the first: the share of the 4-bit codes that differ,
and the KL divergence between the two quantized models on held-out text, beside that from full precision to the first.
Exit code 1 if something that has to be exact is not, or if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from shipped import heldout_windows, load_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, quantize_model
from hf_awq_offload.formats.awq import unpack_columns

MOST_CODES, MOST_KL_SHARE = 0.005, 0.01
"""Limits: share of codes that differ, and KL relative to that between full precision and the first result."""
SETTINGS = {
    "the same again": {},
    "without prefetch": {"prefetch": False},
    "micro-batches of 1 sequence": {"batch_tokens": 1},
    "micro-batches of 8 sequences": {"batch_tokens": 8 * 256},
    "two threads": {},
}
EXACT = ("the same again", "without prefetch")


@torch.no_grad()
def log_probabilities(model: nn.Module) -> Tensor:
    return torch.cat([model(window[:, :256]).logits[0] for window in heldout_windows()[:8]]).double().log_softmax(-1)


def kl(reference: Tensor, other: Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def codes(model: PreTrainedModel) -> Tensor:
    words = [value for name, value in model.state_dict().items() if name.endswith("qweight")]
    return torch.cat([unpack_columns(value).flatten() for value in words])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    samples = parser.parse_args().samples
    recipe = {"n_samples": samples, "max_seq_len": 256, "format": "awq", "batch_tokens": 4 * 256}
    torch.set_num_threads(1)
    full = log_probabilities(load_model())
    first = quantize_model(load_model(), AwqOffloadConfig(**recipe))
    first_codes, first_log = codes(first), log_probabilities(first)
    to_full = kl(full, first_log)
    print(f"{len(first_codes):,} codes, {samples} x 256 tokens; KL from full precision {to_full:.5f} nats")
    failed = False
    for name, changes in SETTINGS.items():
        torch.set_num_threads(2 if name == "two threads" else 1)
        model = quantize_model(load_model(), AwqOffloadConfig(**recipe | changes))
        torch.set_num_threads(1)
        share, between = float((codes(model) != first_codes).double().mean()), kl(first_log, log_probabilities(model))
        own = kl(full, log_probabilities(model))
        print(
            f"{name:30} codes that differ {share:8.4%}   KL {between:.6f}   KL from full precision {own:.5f}",
            flush=True,
        )
        failed |= share > 0 if name in EXACT else share > MOST_CODES or between > MOST_KL_SHARE * to_full
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
