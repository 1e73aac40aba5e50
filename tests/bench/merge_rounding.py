"""Measures what is left of a LoRA adapter when it is merged into 4-bit weights in several ways.

    python tests/bench/merge_rounding.py [--steps 60]

Adapters are trained on the shipped model, quantized, on one half of its held-out text. The two columns are perplexities
of what they were trained on, which shows what they have learned, and of the other half.
"Rounded to the same grid" keeps scales and zero points; "rounded anew" takes each group's range from the sum.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_awq_offload import AwqLinear, AwqOffloadConfig, quantize_model
from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.formats.awq import unpack_columns
from hf_awq_offload.formats.grid import GroupParameters, dequantize, group_parameters, group_range, quantize
from hf_awq_offload.reporting.evaluation import evaluate, token_windows

TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    text = (SHIPPED_MODEL / "heldout.txt").read_text(encoding="utf-8")
    half = len(text) // 2
    training, held_out = (
        token_windows(tokenizer(part, return_tensors="pt", verbose=False).input_ids[0], TOKENS)
        for part in (text[:half], text[half:])
    )
    windows = (training[:48], held_out[:48])
    calibration = AwqOffloadConfig(dataset=torch.cat(training).tolist(), max_seq_len=TOKENS)
    base = AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype=torch.float32, quantization_config=calibration)
    print(f"{'':40}{'trained on':>12}{'held out':>12}")
    show("quantized base", base, windows)
    grids = {name: module for name, module in copy.deepcopy(base).named_modules() if isinstance(module, AwqLinear)}
    model = train(base, training, options.steps)
    show("with adapters", model.get_base_model(), windows)
    merged = model.merge_and_unload().dequantize()
    show("merged, dense", merged, windows)
    for title, same_grid in (("merged, rounded to the same grid", True), ("merged, rounded anew", False)):
        show(title, rounded(merged, grids, same_grid), windows)
    quantize_model(merged, calibration)
    show("merged, quantized on calibration data", merged, windows)


def train(base: PreTrainedModel, windows: list[Tensor], steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    for step in range(steps):
        batch = torch.cat(windows[step * 4 % len(windows) :][:4])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rounded(merged: PreTrainedModel, grids: dict[str, AwqLinear], same_grid: bool) -> PreTrainedModel:
    """Returns a copy whose linears are rounded to the nearest point of a grid."""
    model = copy.deepcopy(merged)
    kept, total = 0.0, 0.0
    for name, linear in grids.items():
        weight = model.get_submodule(name).weight.data
        parameters = group_parameters(group_range(weight, linear.grid), linear.grid)
        if same_grid:
            parameters = GroupParameters(linear.scales.t().float(), unpack_columns(linear.qzeros).t().float())
        result = dequantize(quantize(weight, parameters, linear.grid), parameters, linear.grid)
        if same_grid:
            change, asked = result - linear.dequantized(torch.float32), weight - linear.dequantized(torch.float32)
            kept, total = kept + float((change * asked).sum()), total + float(asked.square().sum())
        weight.copy_(result)
    if same_grid:
        print(f"  (of what the adapters add, rounding to the same grid keeps {kept / total:.1%})")
    return model


def show(title: str, model: PreTrainedModel, texts: tuple[list[Tensor], list[Tensor]]) -> None:
    print(f"{title:40}" + "".join(f"{evaluate(model, windows).perplexity:12.3f}" for windows in texts), flush=True)


if __name__ == "__main__":
    main()
