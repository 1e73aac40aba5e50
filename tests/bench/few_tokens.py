"""Shows what the loss on the calibration data says when there are few of them: nothing.

    python tests/bench/few_tokens.py

Quantizes the shipped model to 4 bits with 1/4, 1, 4 and 16 calibration tokens per input channel of its widest linear.
Prints the loss that the run reports and the KL divergence from full precision on held-out text, both relative to
rounding to nearest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from determinism import kl, log_probabilities
from shipped import builtin_sequences, load_model, quantized
from torch import nn
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig

TOKENS_PER_CHANNEL = (0.25, 1, 4, 16)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    model = load_model()
    channels = max(part.in_features for part in model.model.layers.modules() if isinstance(part, nn.Linear))
    full = log_probabilities(model)
    nearest = kl(full, log_probabilities(quantized(AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest"))[0]))
    text = torch.cat(builtin_sequences(1 + int(TOKENS_PER_CHANNEL[-1] * channels) // 512))
    print(f"widest linear: {channels} channels; rounded to nearest, KL {nearest:.5f} nats")
    for multiple in TOKENS_PER_CHANNEL:
        rows = text[: int(multiple * channels)].split(256)
        recipe = AwqOffloadConfig(dataset=[row.tolist() for row in rows], n_samples=len(rows), max_seq_len=256)
        made, _ = quantized(recipe)
        layers = made.hf_quantizer.report.layers
        loss = sum(layer.loss for layer in layers) / sum(layer.loss_nearest for layer in layers)
        divergence = kl(full, log_probabilities(made)) / nearest
        print(f"{multiple:5} tokens per channel: loss {loss:.3f}, KL on other text {divergence:.3f}", flush=True)


if __name__ == "__main__":
    main()
