"""`hf-awq-offload demo`: the package's main job on the model that ships with it, as a user would do it.

The demo quantizes (rounding to nearest, then AWQ), saves, reloads, compares with full precision on held-out text, and
generates. It then times decoding with a larger model of random weights, before and after quantization: the shipped
model is too small for its weights to dominate the time.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from ..config import AwqOffloadConfig
from ..in_memory import quantize_model
from ..integrations.registration import register
from ..logs import can_redraw, with_own_bars_alone
from ..offload.devices import default_execution_device
from ..offload.memory_use import peak_memory_bytes
from ..reporting.evaluation import Evaluation, decoding_tokens_per_second, evaluate, token_windows
from ..reporting.progress import announce
from .outcome import Outcome
from .parser import PROGRAM

SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "tiny_llama"
"""A Llama of 2.9 million parameters, trained on the documentation that comes with CPython."""

PROMPT = "Return a list of"
EVALUATION_WINDOWS = 48
WINDOW_TOKENS = 512

SPEED_MODEL: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "vocab_size": 2048,
}
SPEED_LAYERS = 4
NEW_TOKENS = 24


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    method: str
    evaluation: Evaluation
    size_bytes: int
    seconds: float | None


def run(options: argparse.Namespace) -> Outcome:
    """Runs the demo, which prints its table as it goes; the outcome's document holds the same rows."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch, with_own_bars_alone():
        out = Path(options.out) if options.out else Path(scratch) / "tiny-llama-awq"
        rows = show(out, Path(scratch) / "tiny-llama-rtn", not options.no_speed)
    return Outcome({"out": options.out, "rows": [asdict(row) for row in rows]}, next_steps(options.out))


def next_steps(out: str | None) -> str:
    """Returns what to run after the demo; `out` is where it has left its checkpoint, if it has."""
    steps = {} if out is None else {f"inspect {shlex.quote(out)}": "shows what the checkpoint holds"}
    steps |= {
        "quantize SRC --plan": "says what your model needs; SRC is its folder or its name on the Hub",
        "quantize SRC OUT": "quantizes it (docs/quickstart.md: the same in Python)",
    }
    program = PROGRAM if shutil.which(PROGRAM) else f"{Path(sys.executable).parent}/{PROGRAM}"
    return "\n".join(["", "What to do next:", *(f"  {program} {step}\n      {what}" for step, what in steps.items())])


def show(awq_folder: Path, nearest_folder: Path, with_speed: bool = True) -> list[Row]:
    """Prints the demo and writes checkpoints to the two folders. Returns the table's rows."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    original = load_for_evaluation(SHIPPED_MODEL)
    token_ids = tokenizer(
        (SHIPPED_MODEL / "heldout.txt").read_text(encoding="utf-8"), return_tensors="pt", verbose=False
    ).input_ids[0]
    windows = token_windows(token_ids, WINDOW_TOKENS, EVALUATION_WINDOWS)
    print(f"Model: {SHIPPED_MODEL.name}, {original.num_parameters():,} parameters")
    found = measured(original, "full precision", windows, original)
    rows = [Row("full precision", found, folder_bytes(SHIPPED_MODEL), None)]
    recipes = {
        "round to nearest": (AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest"), nearest_folder),
        "AWQ": (AwqOffloadConfig(), awq_folder),
    }
    for method, (recipe, folder) in recipes.items():
        seconds = quantize_and_save(recipe, folder)
        reloaded = load_for_evaluation(folder)
        found = measured(reloaded, method, windows, original)
        rows.append(Row(f"{method}, w4 g128", found, folder_bytes(folder), seconds))
    print(table(rows))
    peak_mib = peak_memory_bytes(default_execution_device()) / 2**20
    print(f"\nHeld-out tokens: {rows[0].evaluation.tokens}. Peak memory of this demo: {peak_mib:.0f} MiB.")
    print(f"\n{PROMPT!r}, continued by the model reloaded from {awq_folder}:\n  {generate(reloaded, tokenizer)}")
    if with_speed:
        print(f"\n{speed()}")
    return rows


def measured(model: PreTrainedModel, name: str, windows: list[torch.Tensor], original: PreTrainedModel) -> Evaluation:
    """Evaluates a model, and shows a bar that each of its forward passes moves on; in a log file, a line."""
    if not can_redraw():
        announce(f"Evaluating {name} ...")
        return evaluate(model, windows, original)
    passes = len(windows) * (2 if model is original else 1)
    with logging.tqdm(total=passes, desc=f"Evaluating {name}", unit="window", dynamic_ncols=True) as bar:

        def advance(*_: object) -> None:
            bar.update()

        hook = model.register_forward_hook(advance)
        try:
            return evaluate(model, windows, original)
        finally:
            hook.remove()


def speed() -> str:
    """Returns a text with the decoding speed and size of a random bf16 Llama, before and after quantizing it."""
    announce("Timing a larger model of random weights ...")
    device = default_execution_device()
    config = LlamaConfig(**SPEED_MODEL, num_hidden_layers=SPEED_LAYERS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    lines = [f"Decoding on {device.type}, a Llama of random weights ({model.num_parameters() / 1e6:.0f} M parameters):"]
    for name in ("bf16", "w4 g128"):
        if name != "bf16":
            quantize_model(model, AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest"))
        tokens_per_second = decoding_tokens_per_second(model, NEW_TOKENS)
        lines.append(
            f"  {name:10}{tokens_per_second:8.1f} tokens/s{model.get_memory_footprint() / 1e6:10.0f} MB in memory"
        )
    return "\n".join(lines)


def quantize_and_save(recipe: AwqOffloadConfig, folder: Path) -> float:
    """Quantizes the shipped model with `recipe` into `folder`; returns the seconds that from_pretrained took."""
    register()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        SHIPPED_MODEL, dtype="auto", device_map="auto", quantization_config=recipe
    )
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED_MODEL).save_pretrained(folder)
    return seconds


def load_for_evaluation(folder: Path) -> PreTrainedModel:
    """Loads the checkpoint in `folder` in fp32, so that only the weights make a difference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")


def generate(model: Any, tokenizer: Any) -> str:
    """Returns the model's greedy continuation of the prompt, on one line."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def folder_bytes(folder: Path) -> int:
    """Returns the size of the weights in a checkpoint folder, in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def table(rows: list[Row]) -> str:
    lines = [f"{'':25}{'perplexity':>11}{'KL (nats)':>11}{'same top-1':>12}{'size (MB)':>11}{'seconds':>9}"]
    for row in rows:
        evaluation = row.evaluation
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(
            f"{row.method:25}{evaluation.perplexity:>11.3f}{evaluation.kl_nats:>11.5f}"
            f"{evaluation.top1_agreement:>12.1%}{row.size_bytes / 1e6:>11.2f}{seconds:>9}"
        )
    return "\n".join(lines)
