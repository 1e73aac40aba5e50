"""How far a model is from another (perplexity, KL divergence, top-1 agreement on a text), and how fast it decodes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .layers import calibration_mode


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens."""

    perplexity: float  # exp of the mean negative log-likelihood in nats
    kl_nats: float | None  # KL(reference ‖ model), None without a reference
    top1_agreement: float | None  # share of tokens where both models predict the same one, None without a reference
    tokens: int  # predicted tokens


def token_windows(
    token_ids: Tensor,  # (tokens,) int64
    window_tokens: int,
    count: int | None = None,
) -> list[Tensor]:
    """The first `count` non-overlapping windows of the text, each (1, window_tokens); all full ones by default."""
    windows = [window.unsqueeze(0) for window in token_ids.split(window_tokens) if len(window) == window_tokens]
    return windows if count is None else windows[:count]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Sequence[Tensor],  # each (batch, tokens) int64
    reference: PreTrainedModel | None = None,
) -> Evaluation:
    """Compare `model` on `windows` with the text itself and, where given, with `reference`.

    Both models predict every token of a window but its first. Log-probabilities are taken in fp32.

    Raises:
        ValueError: there is no window, or one of less than two tokens.
    """
    if not windows or any(window.shape[1] < 2 for window in windows):
        raise ValueError("Expected at least one window of at least two tokens; give a longer text.")
    nll_nats, kl_nats, agreed, tokens = 0.0, 0.0, 0, 0
    with calibration_mode(model):
        for window in windows:
            log_p = _log_probabilities(model, window)
            targets = window[:, 1:].flatten()
            nll_nats += float(F.nll_loss(log_p, targets.to(log_p.device), reduction="sum"))
            tokens += targets.numel()
            if reference is not None:
                with calibration_mode(reference):
                    reference_log_p = _log_probabilities(reference, window).to(log_p.device)
                kl_nats += float(F.kl_div(log_p, reference_log_p, reduction="sum", log_target=True))
                agreed += int((log_p.argmax(-1) == reference_log_p.argmax(-1)).sum())
    return Evaluation(
        perplexity=math.exp(nll_nats / tokens),
        kl_nats=None if reference is None else kl_nats / tokens,
        top1_agreement=None if reference is None else agreed / tokens,
        tokens=tokens,
    )


def _log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Log-probabilities of the next token at every position but the last, (batch * (tokens - 1), vocabulary) fp32."""
    logits = model(input_ids=window.to(model.device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float().log_softmax(-1)


def decoding_tokens_per_second(model: PreTrainedModel, new_tokens: int, runs: int = 3) -> float:
    """Speed of greedy `generate` from a prompt of 16 tokens; the median of `runs`, after one to warm up."""
    prompt = torch.arange(1, 17, device=model.device)[None]
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        cast(Any, model).generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return new_tokens / statistics.median(seconds[1:])
