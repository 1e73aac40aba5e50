"""`hf-awq-offload evaluate`: measures quality, distance to another model and speed, or runs lm-eval-harness tasks."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ..evaluating import (
    Side,
    checkpoint_bytes,
    evaluate_streamed,
    fits,
    held_out_tokens,
    require_text,
    streaming_limits,
    tokenizer_if_any,
)
from ..evaluation.gate import too_far
from ..integrations.pairs import config_of, require_pair, require_two
from ..reporting.distances import PositionBucket
from ..reporting.evaluation import Evaluation, decoding_tokens_per_second, evaluate, sliding_windows
from .checkpoint_folder import named
from .models import from_hub, load, load_tokenizer, model_class_of
from .outcome import OK, TOO_FAR, CommandError, Outcome, UsageError
from .recipe_options import LIMITS, given_fields


def run(options: argparse.Namespace) -> Outcome:
    """Evaluates MODEL and, with --against, compares it with BASE; see evaluating.py for what is in memory.

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
    limits = streaming_limits(**given_fields(options, LIMITS))
    sides = _sides(options)
    require_two(sides)
    configs = []
    for source, arguments in sides:
        with named(str(source)):
            configs.append(config_of(source, arguments))
    require_pair(configs)
    tokenizers = [load_tokenizer(options.tokenizer or options.model, options)]
    if options.against and not options.tokenizer and (other := tokenizer_if_any(sides[1])) is not None:
        tokenizers.append(other)
    token_ids = held_out_tokens(tokenizers, options.dataset, options.text_column, options.tokens)
    if len(token_ids) < 2:
        raise CommandError(f"{options.dataset} has {len(token_ids)} tokens; expected at least two.")
    require_text(token_ids, configs[0], options.window)
    windows = sliding_windows(token_ids, options.window, stride)
    streamed = not fits(sides, limits, options.device_map) if options.streamed is None else options.streamed
    if streamed:
        evaluation = evaluate_streamed(sides, windows, limits, model_class_of(options), options.dtype)
        speed, weights_bytes = None, checkpoint_bytes(*sides[0])
    else:
        model = load(options.model, options)
        against = options.against
        reference = load(against, options, options.against_revision, is_base=True) if against else None
        evaluation = evaluate(model, windows, reference)
        speed = decoding_tokens_per_second(model, options.new_tokens) if options.new_tokens else None
        weights_bytes = model.get_memory_footprint()
    found = too_far(evaluation, options.max_kl)
    document = {
        "model": options.model,
        "against": options.against,
        "dataset": options.dataset,
        "window_tokens": options.window,
        "stride_tokens": stride,
        **asdict(evaluation),
        "decoding_tokens_per_second": speed,
        "weights_bytes": weights_bytes,
        "max_kl": options.max_kl,
        "too_far": None if found is None else asdict(found),
    }
    text = _text(evaluation, document) + ("" if found is None else f"\n\nTOO FAR: {found}")
    return Outcome(document, text, OK if found is None else TOO_FAR)


def _sides(options: argparse.Namespace) -> list[Side]:
    """Returns MODEL and BASE with what `from_pretrained` needs for each."""
    sides: list[Side] = [(options.model, from_hub(options, options.model))]
    if options.against:
        revision = {"revision": options.against_revision} if options.against_revision else {}
        sides.append((options.against, from_hub(options, options.against, is_base=True) | revision))
    return sides


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
    if len(evaluation.positions) > 1:
        compared = "" if evaluation.kl_nats is None else f"{'KL':>10}{'same top-1':>12}"
        lines += ["", f"{'tokens before':24}{'tokens':>8}{'perplexity':>12}{compared}"]
        lines += map(_row, evaluation.positions)
        lines.append("")
    if evaluation.layers:
        last = evaluation.layers[-1]
        lines.append(f"{'error of hidden states':24}{last.relative_error:.4f}   (after {last.name}, relative)")
    if document["decoding_tokens_per_second"] is not None:
        lines.append(f"{'decoding (tokens/s)':24}{document['decoding_tokens_per_second']:.1f}")
    lines.append(f"{'weights (MB)':24}{document['weights_bytes'] / 1e6:.1f}")
    return "\n".join(lines)


def _row(bucket: PositionBucket) -> str:
    between = f"{bucket.first} and more" if bucket.last is None else f"{bucket.first} to {bucket.last}"
    compared = "" if bucket.kl_nats is None else f"{bucket.kl_nats:>10.5f}{bucket.top1_agreement:>12.2%}"
    return f"{between:24}{bucket.tokens:>8}{bucket.perplexity:>12.4f}{compared}"
