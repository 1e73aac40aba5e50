"""Measures how far a quantized model is from the full-precision one, in nats per token and in perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def compute_logits(
    model: PreTrainedModel,
    batches: Iterable[Tensor],  # each (batch, tokens) int64
) -> list[Tensor]:
    """Returns logits per batch, (batch, tokens, vocabulary) in the model's dtype, to reuse in `kl_divergence`."""
    return [model(input_ids=batch, use_cache=False).logits for batch in batches]


@torch.no_grad()
def kl_divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel | Sequence[Tensor],
    batches: Sequence[Tensor],  # each (batch, tokens) int64
) -> float:
    """Returns the mean over all tokens of KL(reference ‖ model) of next-token distributions, in nats, computed in fp64.

    Args:
        model: the quantized model, in evaluation mode.
        reference: the full-precision model, or its logits per batch, (batch, tokens, vocabulary).
        batches: token ids without padding.
    """
    total_nats, tokens = 0.0, 0
    for index, batch in enumerate(batches):
        if isinstance(reference, PreTrainedModel):
            (expected_logits,) = compute_logits(reference, [batch])
        else:
            expected_logits = reference[index]
        (logits,) = compute_logits(model, [batch])
        expected = torch.log_softmax(expected_logits.double(), dim=-1)
        actual = torch.log_softmax(logits.double(), dim=-1)
        total_nats += (expected.exp() * (expected - actual)).sum().item()
        tokens += batch.numel()
    return total_nats / tokens


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    batches: Sequence[Tensor],  # each (batch, tokens) int64
) -> float:
    """Returns exp of the mean negative log-likelihood of all tokens but the first of each sequence."""
    total_nats, tokens = 0.0, 0
    for batch in batches:
        (logits,) = compute_logits(model, [batch])
        log_probabilities = torch.log_softmax(logits[:, :-1].double(), dim=-1)
        total_nats -= log_probabilities.gather(-1, batch[:, 1:, None]).sum().item()
        tokens += batch[:, 1:].numel()
    return math.exp(total_nats / tokens)
