"""Compares rounding to nearest and error feedback, with few and many calibration tokens (docs/design/002).

python tests/bench/rounding.py
"""

from __future__ import annotations

from shipped import builtin_sequences, heldout_windows, load_model, quantized

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.reporting.evaluation import evaluate


def main() -> None:
    original, windows = load_model(), heldout_windows()
    print(
        f"{'calibration':>16}{'ratio':>8}{'nearest':>10}{'feedback':>10}{'seconds':>16}   (KL in nats on held-out text)"
    )
    for n_samples in (2, 8, 128):
        sequences = builtin_sequences(n_samples)
        kl, seconds = {}, {}
        for rounding in ("nearest", "error_feedback"):
            recipe = AwqOffloadConfig(dataset=sequences, n_samples=n_samples, rounding=rounding)
            model, seconds[rounding] = quantized(recipe)
            kl[rounding] = evaluate(model, windows, original).kl_nats
        print(
            f"{n_samples:>10} x 512{kl['error_feedback'] / kl['nearest']:>8.2f}{kl['nearest']:>10.5f}"
            f"{kl['error_feedback']:>10.5f}{seconds['nearest']:>8.1f}{seconds['error_feedback']:>8.1f}"
        )


if __name__ == "__main__":
    main()
