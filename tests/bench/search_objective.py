"""Measures whether searching on gram matrices costs quality against AWQ's search on block outputs (docs/design/001).

    python tests/bench/search_objective.py

Same model, same calibration tokens (48 x 512 of the built-in text), same grid; KL divergence from full precision on
held-out text. The block-output search is tests/references/block_search.py, written from the paper.
"""

from __future__ import annotations

import sys
import time

from shipped import builtin_sequences, heldout_windows, load_model, quantized

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.reporting.evaluation import evaluate

CALIBRATION_SEQUENCES = 48


def main() -> None:
    from references.block_search import quantize_by_block_search

    original = load_model()
    windows = heldout_windows()
    sequences = builtin_sequences(CALIBRATION_SEQUENCES)
    rows = []
    data = {"dataset": sequences, "n_samples": CALIBRATION_SEQUENCES}
    recipes = {
        "round to nearest": AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest"),
        "gram, scales only": AwqOffloadConfig(**data, clip=False, rounding="nearest"),
        "gram, clip only": AwqOffloadConfig(**data, n_grid=0, rounding="nearest"),
        "gram, scales and clip": AwqOffloadConfig(**data, rounding="nearest"),
        "… and error feedback": AwqOffloadConfig(**data),
    }
    for name, recipe in recipes.items():
        model, seconds = quantized(recipe)
        rows.append((name, evaluate(model, windows, original), seconds))
        print(f"  {name}: done", file=sys.stderr)
    start = time.perf_counter()
    model = quantize_by_block_search(original, [sequence.unsqueeze(0) for sequence in sequences])
    rows.append(("block outputs, scales and clip", evaluate(model, windows, original), time.perf_counter() - start))
    kl_nearest = rows[0][1].kl_nats
    print(f"{'':32}{'KL / nearest':>14}{'KL (nats)':>12}{'perplexity':>12}{'seconds':>9}")
    for name, evaluation, seconds in rows:
        print(
            f"{name:32}{evaluation.kl_nats / kl_nearest:>14.3f}{evaluation.kl_nats:>12.5f}"
            f"{evaluation.perplexity:>12.3f}{seconds:>9.1f}"
        )


if __name__ == "__main__":
    main()
