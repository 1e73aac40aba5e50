"""Measures the memory that training LoRA adapters takes, on a quantized model and on the same model in bf16.

    python tests/bench/training_memory.py [--layers 8] [--hidden 2048] [--checkpointing]

Weights are random: memory does not depend on them. Each measurement is a process of its own, which builds its model on
disk first and then loads, trains a few steps of `--tokens` tokens, and reports

    held    weights + adapters + gradients + optimizer, by their tensors' sizes
    peak    of the resident set (on a GPU: of its allocations) in the second step, less what there was before loading

The base of the table's ratios is LoRA on bf16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from hf_awq_offload import AwqOffloadConfig

STEPS = 2
RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
    if options.train:
        print(json.dumps(train(Path(options.train), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        dense, quantized = Path(folder) / "bf16", Path(folder) / "awq"
        build(dense, options)
        quantize(dense, quantized)
        rows = {name: measure(path) for name, path in (("bf16", dense), ("w4 g128", quantized))}
    print(
        f"LoRA (r={RANK}, all-linear) on {options.layers} layers of hidden {options.hidden}, {options.tokens} tokens,"
    )
    checkpointing = "on" if options.checkpointing else "off"
    print(f"{options.device}, torch {torch.__version__}, gradient checkpointing {checkpointing}")
    print(f"{'':10}{'held (MB)':>12}{'peak (MB)':>12}{'processor s/step':>18}")
    for name, row in rows.items():
        print(f"{name:10}{row['held'] / 1e6:12.0f}{row['peak'] / 1e6:12.0f}{row['seconds']:18.2f}")
    ratios = {key: rows["w4 g128"][key] / rows["bf16"][key] for key in ("held", "peak", "seconds")}
    print(f"{'ratio':10}{ratios['held']:12.2f}{ratios['peak']:12.2f}{ratios['seconds']:18.2f}")


def build(folder: Path, options: argparse.Namespace) -> None:
    """Saves a random bf16 Llama to `folder`."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        vocab_size=options.vocabulary,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def quantize(source: Path, target: Path) -> None:
    recipe = AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest")
    AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=recipe).save_pretrained(target)


def measure(folder: Path) -> dict[str, float]:
    """Runs `train` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--train", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def train(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Loads the model, adds adapters, and trains for a few steps."""
    before = used_bytes(options.device)
    model = get_peft_model(load(folder, options), LoraConfig(r=RANK, target_modules="all-linear"))
    if options.checkpointing:
        base = model.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        base.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(options.vocabulary, (1, options.tokens), device=options.device)
    model.train()
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        with Peak(options.device) as peak:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        held = held_bytes(model, optimizer)
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return {"held": held, "peak": peak.bytes - before, "seconds": seconds[-1]}


def load(folder: Path, options: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=options.device)


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of weights, adapters, gradients and the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def used_bytes(device: str) -> int:
    if device == "cpu":
        return psutil.Process().memory_info().rss
    return torch.accelerator.memory_allocated()


class Peak:
    """Records the largest memory in use inside the context, sampled every two milliseconds."""

    def __init__(self, device: str):
        self.device, self.bytes, self.is_done = device, 0, threading.Event()

    def __enter__(self) -> Peak:
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.is_done.wait(0.002):
            self.bytes = max(self.bytes, used_bytes(self.device))

    def __exit__(self, *exception: object) -> None:
        self.is_done.set()
        self.thread.join()
        if self.device != "cpu":
            self.bytes = torch.accelerator.max_memory_allocated()


if __name__ == "__main__":
    main()
