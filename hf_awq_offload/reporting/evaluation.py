"""Measures how far a model is from another (perplexity, KL divergence, top-1 agreement) and how fast it decodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationDataError
from ..model.decoder_layers import calibration_mode
from .distances import Distances, PositionBucket, rows_at_a_time


@dataclass(frozen=True)
class LayerError:
    """How far the hidden states after a decoder layer are from the original model's."""

    name: str
    relative_error: float  # ‖h - h₀‖ / ‖h₀‖ over all tokens; it accumulates from layer to layer


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens."""

    perplexity: float  # exp of the mean negative log-likelihood in nats
    kl_nats: float | None  # KL(reference ‖ model), None without a reference
    top1_agreement: float | None  # share of tokens where both models predict the same one, None without a reference
    tokens: int  # predicted tokens
    reference_perplexity: float | None = None  # the reference's, on the same tokens
    positions: tuple[PositionBucket, ...] = ()  # the same by the number of tokens before the predicted one
    layers: tuple[LayerError, ...] = ()  # in the model's order; empty unless the models ran layer by layer
    streamed: bool = False  # whether they did


class Window(NamedTuple):
    """A stretch of text whose last tokens a model is scored on, or a batch of such stretches."""

    token_ids: Tensor  # (batch, tokens) int64
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

    Log-probabilities are computed in fp32, for a block of rows at a time.

    Raises:
        CalibrationDataError: there is no window, or one has fewer than two tokens.
        NumericalError: logits are not a number.
    """
    stretches = stretches_of(windows)
    distances = Distances(reference is not None)
    with ExitStack() as stack:
        for evaluated in (model, reference):
            if evaluated is not None:
                stack.enter_context(calibration_mode(evaluated))
        for stretch in stretches:
            logits = _logits(model, stretch)
            reference_logits = None if reference is None else _logits(reference, stretch)
            for rows, targets, positions in scored_blocks(stretch, logits.shape[-1]):
                of_reference = None if reference_logits is None else reference_logits[rows]
                distances.add(logits[rows], of_reference, targets, positions)
    return evaluation_of(distances)


def evaluation_of(distances: Distances, layers: Sequence[LayerError] = (), streamed: bool = False) -> Evaluation:
    """Returns what was measured on all rows that `distances` was given."""
    total = distances.total
    return Evaluation(
        perplexity=total.perplexity,
        kl_nats=total.kl_nats,
        top1_agreement=total.top1_agreement,
        tokens=total.tokens,
        reference_perplexity=total.reference_perplexity,
        positions=distances.buckets,
        layers=tuple(layers),
        streamed=streamed,
    )


def scored_blocks(stretch: Window, vocabulary: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields the scored rows of a batch of windows, block by block: (rows, targets, positions).

    Rows count the scored tokens of all windows, one window after the other (`scored_rows`).
    """
    length = stretch.token_ids.shape[1]
    targets = stretch.token_ids[:, -stretch.predicted :].flatten()
    positions = torch.arange(length - stretch.predicted, length).repeat(len(stretch.token_ids))
    step = rows_at_a_time(vocabulary)
    for start in range(0, len(targets), step):
        rows = slice(start, min(start + step, len(targets)))
        yield rows, targets[rows], positions[rows]


def scored_rows(
    values: Tensor,  # (batch, tokens, ...): one for each token of a batch of windows
    predicted: int,
) -> Tensor:
    """Returns those from which the scored tokens are predicted, (batch * predicted, ...)."""
    return values[:, -predicted - 1 : -1].flatten(0, 1)


def _logits(model: PreTrainedModel, stretch: Window) -> Tensor:
    """Returns the logits that predict the scored tokens, (batch * predicted, vocabulary)."""
    logits = model(input_ids=stretch.token_ids.to(model.device), use_cache=False).logits
    return scored_rows(logits, stretch.predicted)


def stretches_of(windows: Sequence[Tensor | Window]) -> list[Window]:
    """Returns windows as such; of a plain tensor, all tokens but the first are scored.

    Raises:
        CalibrationDataError: there is none, or one has fewer than two tokens.
    """
    stretches = [window if isinstance(window, Window) else Window(window, window.shape[1] - 1) for window in windows]
    shortest = min((stretch.token_ids.shape[1] for stretch in stretches), default=0)
    if shortest < 2:
        raise CalibrationDataError(
            f"There are {len(stretches)} windows of text, the shortest of {shortest} tokens; expected at least one, of "
            "two tokens or more. Give a longer text."
        )
    return stretches


def decoding_tokens_per_second(model: PreTrainedModel, new_tokens: int, runs: int = 3) -> float:
    """Returns the speed of greedy `generate` from a prompt of 16 tokens: the median of `runs`, after a warm-up run."""
    prompt = torch.arange(1, 17, device=model.device)[None]
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        cast(Any, model).generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return new_tokens / statistics.median(seconds[1:])
