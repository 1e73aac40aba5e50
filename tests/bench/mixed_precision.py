"""Compares bits per linear, chosen by loss under a budget, with the same bits for all (KL on held-out text).

    python tests/bench/mixed_precision.py [--n-samples 48] [--windows 24] [--budgets 3 3.5 4]

The loss of linear i at b bits is that of rounding to the nearest on its own gram matrix, tr(D G Dᵀ). Bits minimize
Σ w_i · loss_i(b_i) under Σ size_i · b_i ≤ budget · Σ size_i, with the weights w

    absolute   1
    relative   1 / tr(W G Wᵀ), the linear's own output
    gradient   the mean square of the loss's gradient in the linear's output: what an error there does to the model

One Lagrange multiplier is the same for all linears; what it leaves of the budget goes to the best bargains. The choice
is handed to the recipe as `overrides`.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict

from shipped import builtin_sequences, heldout_windows, load_model, quantized
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.formats.grid import Grid, quantize_dequantize
from hf_awq_offload.reporting.evaluation import evaluate

GROUP_SIZE = 128
BITS = (2, 3, 4, 8)
WEIGHTS = ("absolute", "relative", "gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-samples", type=int, default=48)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--budgets", type=float, nargs="+", default=(2.5, 3.0, 3.5, 4.0, 5.0))
    options = parser.parse_args()
    original, windows = load_model(), heldout_windows()[: options.windows]
    sequences = builtin_sequences(options.n_samples)
    losses, weights, sizes = measure(original, sequences)

    def kl(base_bits: int, overrides: dict[str, dict[str, int]] | None) -> float:
        fields = {"bits": base_bits, "overrides": overrides, "group_size": GROUP_SIZE, "n_samples": len(sequences)}
        model, _ = quantized(AwqOffloadConfig(dataset=sequences, **fields))
        return evaluate(model, windows, original).kl_nats

    uniform = {float(bits): kl(bits, None) for bits in (2, 3, 4) if bits in options.budgets}
    print(f"{'budget':>7}{'uniform':>10}" + "".join(f"{name:>22}" for name in WEIGHTS) + "   (KL, average bits used)")
    for budget in options.budgets:
        cells = []
        for name in WEIGHTS:
            weighted = {each: {b: v * weights[name][each] for b, v in loss.items()} for each, loss in losses.items()}
            bits = choose(weighted, sizes, budget)
            used = sum(sizes[each] * bits[each] for each in bits) / sum(sizes.values())
            overrides = {f"^{re.escape(each)}$": {"bits": b} for each, b in bits.items()}
            cells.append(f"{kl(4, overrides):>14.5f} ({used:.2f})")
        base = f"{uniform[budget]:.5f}" if budget in uniform else ""
        print(f"{budget:>7}{base:>10}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def measure(
    model: PreTrainedModel, sequences: list[Tensor]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[str, float]], dict[str, int]]:
    """Returns losses by linear and bits, weights by name and linear, and sizes by linear."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: linear for name, linear in linears.items() if ".layers." in name}
    grams: dict[str, Tensor] = {}
    squares: dict[str, float] = defaultdict(float)

    def watch(name: str):
        def hook(linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            rows = args[0].detach().flatten(0, -2)
            grams[name] = grams.get(name, 0) + rows.t() @ rows
            output.register_hook(
                lambda gradient: squares.update({name: squares[name] + float(gradient.square().sum())})
            )

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    for sequence in sequences:
        ids = sequence[None]
        model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    tokens = sum(len(sequence) for sequence in sequences)
    losses, weights = {}, {name: {} for name in WEIGHTS}
    for name, linear in linears.items():
        weight, gram = linear.weight.detach(), grams[name] / tokens
        losses[name] = {}
        for bits in BITS:
            difference = quantize_dequantize(weight, Grid(bits, GROUP_SIZE, True)) - weight
            losses[name][bits] = float(((difference @ gram) * difference).sum())
        weights["absolute"][name] = 1.0
        weights["relative"][name] = 1 / float(((weight @ gram) * weight).sum())
        weights["gradient"][name] = squares[name] / (tokens * linear.out_features)
    return losses, weights, {name: linear.weight.numel() for name, linear in linears.items()}


def choose(losses: dict[str, dict[int, float]], sizes: dict[str, int], budget: float) -> dict[str, int]:
    """Chooses the bits of every linear with the least total loss within the budget."""
    allowed = budget * sum(sizes.values())

    def at(price: float) -> dict[str, int]:
        return {name: min(loss, key=lambda b: loss[b] + price * sizes[name] * b) for name, loss in losses.items()}

    def cost(bits: dict[str, int]) -> int:
        return sum(sizes[name] * bits[name] for name in bits)

    low, high = 0.0, max(loss[2] for loss in losses.values())
    for _ in range(200):
        price = (low + high) / 2
        low, high = (price, high) if cost(at(price)) > allowed else (low, price)
    bits = at(high)
    while True:
        gains = [
            ((losses[name][bits[name]] - losses[name][more]) / (sizes[name] * (more - bits[name])), name, more)
            for name in bits
            for more in BITS
            if more > bits[name] and cost(bits) + sizes[name] * (more - bits[name]) <= allowed
        ]
        if not gains:
            return bits
        _, name, more = max(gains)
        bits[name] = more


if __name__ == "__main__":
    main()
