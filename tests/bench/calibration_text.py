"""Measures how much the calibration text matters: built-in text against the text that the model is evaluated on.

    python tests/bench/calibration_text.py

The held-out text is halved: one half is in-domain calibration data, KL divergence is measured on the other.
"""

from __future__ import annotations

import torch
from shipped import builtin_sequences, heldout_windows, load_model, quantized

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.reporting.evaluation import evaluate


def main() -> None:
    original = load_model()
    windows = heldout_windows()
    calibration, judged = windows[::2], windows[1::2]
    n_samples = len(calibration)
    random_ids = torch.randint(original.config.vocab_size, (n_samples, 512), generator=torch.Generator().manual_seed(0))
    datasets = {
        "in-domain": [window[0] for window in calibration],
        "built-in text": builtin_sequences(n_samples),
        "random tokens": random_ids,
    }
    nearest, _ = quantized(AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest"))
    kl_nearest = evaluate(nearest, judged, original).kl_nats
    print(f"{n_samples} x 512 calibration tokens, judged on {len(judged)} x 512 others")
    print(f"{'':18}{'KL / nearest':>14}{'KL (nats)':>12}\n{'no data (nearest)':18}{1:>14.3f}{kl_nearest:>12.5f}")
    for name, dataset in datasets.items():
        model, _ = quantized(AwqOffloadConfig(dataset=dataset, n_samples=n_samples))
        kl = evaluate(model, judged, original).kl_nats
        print(f"{name:18}{kl / kl_nearest:>14.3f}{kl:>12.5f}")


if __name__ == "__main__":
    main()
