"""Measures how far a model is from another (perplexity, KL divergence, top-1 agreement) and how fast it decodes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..model.decoder_layers import calibration_mode


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens."""

    perplexity: float  # exp of the mean negative log-likelihood in nats
    kl_nats: float | None  # KL(reference ‖ model), None without a reference
    top1_agreement: float | None  # share of tokens where both models predict the same one, None without a reference
    tokens: int  # predicted tokens
    reference_perplexity: float | None = None  # the reference's, on the same tokens


class Window(NamedTuple):
    """A stretch of text whose last tokens a model is scored on."""

    token_ids: Tensor  # (1, tokens) int64
    predicted: int  # how many of the last tokens are scored; those before them are context


def token_windows(
    token_ids: Tensor,  # (tokens,) int64
    window_tokens: int,
    count: int | None = None,
) -> list[Tensor]:
    """Returns the first `count` non-overlapping windows of text, each (1, window_tokens); all full ones by default."""
    windows = [window.unsqueeze(0) for window in token_ids.split(window_tokens) if len(window) == window_tokens]
    return windows if count is None else windows[:count]


def sliding_windows(
    token_ids: Tensor,  # (tokens,) int64
    window_tokens: int,
    stride_tokens: int,
) -> list[Window]:
    """Returns windows that start every `stride_tokens`; each token of the text but the first is scored exactly once.

    A token is predicted from at least `window_tokens - stride_tokens` preceding tokens, where the text has them. If the
    stride equals the window, the first token of each window is context only and is never scored.

    Raises:
        ValueError: the text has fewer than two tokens, or the stride is not between 1 and the window.
    """
    if not 1 <= stride_tokens <= window_tokens or window_tokens < 2:
        raise ValueError(
            f"The stride is {stride_tokens} and the window {window_tokens} tokens; expected a window of at least 2 and "
            "a stride between 1 and the window."
        )
    if len(token_ids) < 2:
        raise ValueError(f"The text has {len(token_ids)} tokens; expected at least two. Give a longer text.")
    windows, done = [], 1  # tokens that are scored; the first can't be
    for start in range(0, len(token_ids), stride_tokens):
        end = min(start + window_tokens, len(token_ids))
        predicted = min(end - done, end - start - 1)
        if predicted:
            windows.append(Window(token_ids[start:end].unsqueeze(0), predicted))
        done = end
        if end == len(token_ids):
            break
    return windows


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Sequence[Tensor | Window],  # tensors (batch, tokens) int64: all but the first token is predicted
    reference: PreTrainedModel | None = None,
) -> Evaluation:
    """Measures `model` on `windows` against the text itself and, if given, against `reference`.

    Log-probabilities are computed in fp32.

    Raises:
        ValueError: there is no window, or one has fewer than two tokens.
    """
    stretches = [window if isinstance(window, Window) else Window(window, window.shape[1] - 1) for window in windows]
    if not stretches or any(stretch.token_ids.shape[1] < 2 for stretch in stretches):
        raise ValueError("Expected at least one window of at least two tokens; give a longer text.")
    nll_nats, reference_nll_nats, kl_nats, agreed, tokens = 0.0, 0.0, 0.0, 0, 0
    with calibration_mode(model):
        for stretch in stretches:
            log_p = _log_probabilities(model, stretch)
            targets = stretch.token_ids[:, -stretch.predicted :].flatten().to(log_p.device)
            nll_nats += float(F.nll_loss(log_p, targets, reduction="sum"))
            tokens += targets.numel()
            if reference is not None:
                with calibration_mode(reference):
                    reference_log_p = _log_probabilities(reference, stretch).to(log_p.device)
                reference_nll_nats += float(F.nll_loss(reference_log_p, targets, reduction="sum"))
                kl_nats += float(F.kl_div(log_p, reference_log_p, reduction="sum", log_target=True))
                agreed += int((log_p.argmax(-1) == reference_log_p.argmax(-1)).sum())
    return Evaluation(
        perplexity=_exp(nll_nats / tokens),
        kl_nats=None if reference is None else kl_nats / tokens,
        top1_agreement=None if reference is None else agreed / tokens,
        tokens=tokens,
        reference_perplexity=None if reference is None else _exp(reference_nll_nats / tokens),
    )


def _log_probabilities(model: PreTrainedModel, stretch: Window) -> Tensor:
    """Returns the log-probabilities at the scored tokens, (batch * predicted, vocabulary) fp32."""
    logits = model(input_ids=stretch.token_ids.to(model.device), use_cache=False).logits
    return logits[:, -stretch.predicted - 1 : -1].flatten(0, 1).float().log_softmax(-1)


def _exp(nats: float) -> float:
    """Returns infinity instead of overflowing, which a broken model's perplexity would do."""
    return math.exp(nats) if nats < 700 else math.inf


def decoding_tokens_per_second(model: PreTrainedModel, new_tokens: int, runs: int = 3) -> float:
    """Returns the speed of greedy `generate` from a prompt of 16 tokens: the median of `runs`, after a warm-up run."""
    prompt = torch.arange(1, 17, device=model.device)[None]
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        cast(Any, model).generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return new_tokens / statistics.median(seconds[1:])
