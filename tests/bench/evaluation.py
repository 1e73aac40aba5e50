"""Measures what a streamed evaluation takes: peak resident memory for 6, 24 and 96 layers, and time.

    python tests/bench/evaluation.py [--layers 6 24 96]    memory, 8 windows of 256 tokens
    python tests/bench/evaluation.py --cost                processor time relative to bare forward passes of both models
    python tests/bench/evaluation.py --bits                how far the shipped model is from its original at 2 to 8 bits

Memory is counted above what the interpreter and its modules take; weights are random (hidden 1024), in bf16. The cost
is that of 16 windows of 512 tokens through 8 layers, in fp32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from made import make_checkpoint, measured, size_bytes

import hf_awq_offload
from hf_awq_offload import AwqOffloadConfig, evaluate, quantize

SHIPPED = Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama"
MIB = 2**20
CHEAP = "AwqOffloadConfig(dataset=token_ids({source!r}, 1, 128), n_samples=1, n_grid=0, clip=False, rounding='nearest')"
EVALUATE = """
from hf_awq_offload import evaluate
ids = torch.tensor(token_ids({source!r}, {windows}, {tokens})).flatten()
{measurement}
"""
STREAMED = (
    "evaluate({out!r}, against={source!r}, dataset=ids, window_tokens={tokens}, stride_tokens={tokens}, "
    "streamed=True{more})"
)
BARE = """
start = time.perf_counter(), time.process_time()
for folder in ({out!r}, {source!r}):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.dequantize() if folder == {out!r} else model
    before = time.process_time()
    with torch.no_grad():
        for window in ids.split({tokens}):
            model(window[None], use_cache=False)
    passes = locals().get("passes", 0.0) + time.process_time() - before
more = {{"passes": passes}}
"""


def made(folder: Path, n_layers: int) -> tuple[str, str]:
    """Returns the folders of a checkpoint and of what it was quantized to."""
    source, out = str(make_checkpoint(folder / "source", n_layers)), str(folder / "out")
    measured(f"quantize({source!r}, {out!r}, {CHEAP.format(source=source)})")
    return source, out


def memory(layers: list[int]) -> None:
    print("| layers | files (MiB) | peak above baseline (MiB) | to the first | seconds |\n|---|---|---|---|---|")
    first = None
    for n_layers in layers:
        with tempfile.TemporaryDirectory() as scratch:
            source, out = made(Path(scratch), n_layers)
            values = {"source": source, "out": out, "windows": 8, "tokens": 256, "more": ""}
            result = measured(EVALUATE.format(measurement=STREAMED.format(**values), **values))
            size = size_bytes(Path(source)) + size_bytes(Path(out))
        first = first or result["above"]
        print(
            f"| {n_layers} | {size / MIB:.0f} | {result['above'] / MIB:.0f} | {result['above'] / first:.3f} "
            f"| {result['seconds']:.0f} |",
            flush=True,
        )


def cost() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, out = made(Path(scratch), 8)
        values = {"source": source, "out": out, "windows": 16, "tokens": 512, "more": ", dtype=torch.float32"}
        streamed = measured(EVALUATE.format(measurement=STREAMED.format(**values), **values))["cpu_seconds"]
        bare = measured(EVALUATE.format(measurement=BARE.format(**values), **values))["passes"]
    print(f"streamed {streamed:.1f} s, two bare passes {bare:.1f} s of processor time: {streamed / bare:.2f} times")


def bits() -> None:
    print("| bits | perplexity | KL (nats) | same top-1 | hidden states | file (MB) |\n|---|---|---|---|---|---|")
    for n_bits in (2, 3, 4, 8):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            quantize(SHIPPED, out, AwqOffloadConfig(bits=n_bits, group_size=64, n_samples=32, max_seq_len=256))
            found = evaluate(
                out,
                against=SHIPPED,
                dataset=SHIPPED / "heldout.txt",
                most_tokens=8000,
                window_tokens=256,
                streamed=True,
                dtype=torch.float32,
            )
            size = size_bytes(out)
        assert found.kl_nats is not None
        assert found.top1_agreement is not None
        print(
            f"| {n_bits} | {found.perplexity:.2f} | {found.kl_nats:.5f} | {found.top1_agreement:.1%} "
            f"| {found.layers[-1].relative_error:.3f} | {size / 1e6:.2f} |",
            flush=True,
        )
    print(f"The original's perplexity is {found.reference_perplexity:.2f}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24, 96])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--bits", action="store_true")
    options = parser.parse_args()
    if options.cost:
        cost()
    elif options.bits:
        bits()
    else:
        memory(options.layers)
