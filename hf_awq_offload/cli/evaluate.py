"""`hf-awq-offload evaluate`: measures quality, distance to another model and speed, or runs lm-eval-harness tasks."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ..reporting.evaluation import Evaluation, decoding_tokens_per_second, evaluate, sliding_windows
from ..reporting.evaluation_text import evaluation_tokens
from .models import load, load_tokenizer
from .outcome import CommandError, Outcome, UsageError


def run(options: argparse.Namespace) -> Outcome:
    """Evaluates MODEL and, with --against, compares it with BASE; both are then in memory at once.

    Raises:
        UsageError: --stride and --window don't fit together.
        CommandError: the text is too short.
    """
    if options.tasks is not None:
        from .tasks import run_tasks  # lm-eval is an extra

        return run_tasks(options)
    stride = options.stride or max(1, options.window // 2)
    if options.window < 2:
        raise UsageError(f"--window is {options.window}; a window needs at least 2 tokens.")
    if stride > options.window:
        raise UsageError(f"--stride is {stride}, more than --window ({options.window}): tokens would be skipped.")
    tokenizer = load_tokenizer(options.tokenizer or options.model, options)
    token_ids = evaluation_tokens(options.dataset, tokenizer, options.tokens, options.text_column)
    if len(token_ids) < 2:
        raise CommandError(f"{options.dataset} has {len(token_ids)} tokens; expected at least two.")
    model = load(options.model, options)
    reference = load(options.against, options, options.against_revision) if options.against else None
    evaluation = evaluate(model, sliding_windows(token_ids, options.window, stride), reference)
    speed = decoding_tokens_per_second(model, options.new_tokens) if options.new_tokens else None
    document = {
        "model": options.model,
        "against": options.against,
        "dataset": options.dataset,
        "window_tokens": options.window,
        "stride_tokens": stride,
        **asdict(evaluation),
        "decoding_tokens_per_second": speed,
        "weights_bytes": model.get_memory_footprint(),
    }
    return Outcome(document, _text(evaluation, document))


def _text(evaluation: Evaluation, document: dict[str, Any]) -> str:
    windows = f"windows of {document['window_tokens']}, every {document['stride_tokens']}"
    on = f"{evaluation.tokens} tokens of {document['dataset']}, {windows}"
    lines = [f"{'perplexity':24}{evaluation.perplexity:.4f}   ({on})"]
    if evaluation.kl_nats is not None:
        lines += [
            f"{'perplexity of base':24}{evaluation.reference_perplexity:.4f}",
            f"{'KL to base (nats)':24}{evaluation.kl_nats:.5f}",
            f"{'same top-1':24}{evaluation.top1_agreement:.2%}",
        ]
    if document["decoding_tokens_per_second"] is not None:
        lines.append(f"{'decoding (tokens/s)':24}{document['decoding_tokens_per_second']:.1f}")
    lines.append(f"{'weights (MB)':24}{document['weights_bytes'] / 1e6:.1f}")
    return "\n".join(lines)
