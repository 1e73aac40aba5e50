"""Compares time, memory and quality of this package and other tools, on one model and the same tokens in one run.

    python tests/bench/quantize.py --samples 32 --peer autoawq=/tmp/autoawq/bin/python
    python tests/bench/quantize.py --samples 32 --layers 2       # the time of a real block shape: random weights

Each quantizer is a process of its own (tests/bench/peers; how to set them up is said there). Times are processor time
in units of one bare forward pass over the same tokens, in fp32 or bf16, whichever is faster here; they hold on a loaded
machine where OMP_NUM_THREADS=1 is set. Quality is measured on the model's held-out text; random weights have none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from shipped import WINDOW_TOKENS, builtin_sequences, heldout_windows
from train_tiny import inject_outliers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_awq_offload.cli.demo import SHIPPED_MODEL
from hf_awq_offload.reporting.evaluation import evaluate

PEERS = Path(__file__).parent / "peers"
OURS = {
    "ours, nearest": {"rounding": "nearest"},
    "ours, error feedback": {"rounding": "error_feedback"},
    "ours, outputs quantized": {"propagate": "quantized"},
    "rounded without data": {"n_grid": 0, "clip": False, "rounding": "nearest"},
}
VOCABULARY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="a folder with heldout.txt in it")
    parser.add_argument("--layers", type=int, help="instead: a Llama of random weights, hidden 1024, so many layers")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--without-outliers", action="store_true", help="take out the channels that train_tiny.py has made loud"
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="a script in peers, and who runs it"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    model, windows = arguments.model, None
    if arguments.layers:
        model = save_block_model(arguments.layers, folder / "model")
        generator = torch.Generator().manual_seed(0)
        sequences = torch.randint(VOCABULARY, (arguments.samples, WINDOW_TOKENS), generator=generator).tolist()
    else:
        sequences = [ids.tolist() for ids in builtin_sequences(arguments.samples, model)]
        windows = heldout_windows(model)
    if arguments.without_outliers:
        model = save_without_outliers(arguments.model, folder / "without_outliers")
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps(sequences), encoding="utf-8")
    bare_seconds = {dtype: bare_forward_seconds(model, sequences, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, seconds in bare_seconds.items():
        print(f"bare forward, {dtype}: {seconds:.1f} s of processor time for {len(sequences)} x {WINDOW_TOKENS} tokens")
    fastest = min(bare_seconds.values())
    jobs = {name: ("ours", sys.executable, fields) for name, fields in OURS.items()}
    jobs |= {name: (name, python, None) for name, python in (peer.split("=", 1) for peer in arguments.peer)}
    original = None if windows is None else AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    print(f"{'':24}{'x bare':>8}{'seconds':>9}{'peak GiB':>10}{'KL (nats)':>11}{'perplexity':>12}{'torch':>15}")
    for name, (script, python, fields) in jobs.items():
        out = folder / name.replace(" ", "_").replace(",", "")
        measured = quantize_in_process(
            script, python, {"RECIPE": json.dumps(fields), "BITS": str(arguments.bits)}, model, tokens, out
        )
        quality = ""
        if windows is not None:
            quantized = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            evaluation = evaluate(quantized, windows, original)
            quality = f"{evaluation.kl_nats:>11.5f}{evaluation.perplexity:>12.3f}"
        print(
            f"{name:24}{measured['processor_seconds'] / fastest:>8.2f}{measured['processor_seconds']:>9.1f}"
            f"{measured['peak_bytes'] / 2**30:>10.2f}{quality or ' ' * 23}{measured['torch']:>15}",
            flush=True,
        )


def save_block_model(layers: int, folder: Path) -> Path:
    """Saves a random Llama with decoder layers of hidden size 1024."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_without_outliers(source: Path, folder: Path) -> Path:
    """Saves a model of train_tiny.py as it was before the outlier channels were added; it computes the same."""
    training = json.loads((source / "training.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    inject_outliers(model, training["outlier_factor"], training["seed"], remove=True)
    model.save_pretrained(folder)
    for file in source.glob("tokenizer*"):  # copied: other releases of transformers read what this one would not write
        shutil.copy(file, folder)
    return folder


@torch.no_grad()
def bare_forward_seconds(model: Path, sequences: list[list[int]], dtype: torch.dtype, batch: int = 8) -> float:
    """Returns the processor time of one pass over the tokens, without the head: least of three batches, scaled up."""
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).base_model
    batches = torch.tensor(sequences).split(batch)
    decoder(input_ids=batches[0][:1], use_cache=False)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        decoder(input_ids=batches[0], use_cache=False)
        seconds.append(time.process_time() - start)
    return min(seconds) * len(sequences) / len(batches[0])


def quantize_in_process(
    script: str, python: str, variables: dict[str, str], model: Path, tokens: Path, out: Path
) -> dict[str, float]:
    """Runs a quantizer, with the checkpoint going to `out`; returns the run's measurements."""
    command = [python, str(PEERS / f"{script}_quantizes.py"), str(model), str(tokens), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
