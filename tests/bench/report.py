"""Measures what a report costs in processor time and bytes, and what recording adds to a quantization.

    python tests/bench/report.py

Reports are of made-up runs (tests/report_samples.py). The records' own work is the error of experts rounded to nearest,
on the tokens of each; it is held against the search of the same run, a Mixtral of 16 experts in 2 layers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import VOCABULARY, tiny_mixtral, token_recipe
from report_samples import PLAN, facts, sample

from hf_awq_offload import quantize_model
from hf_awq_offload.pipeline import layer_quantization
from hf_awq_offload.reporting.files import write_report

RUNS = 3
SIZES = {
    "warm-up": (2, 0, 4),
    "32 layers": (32, 0, 4),
    "96 layers, 8 groups": (96, 0, 8),
    "48, 128 experts": (48, 128, 4),
}


def report_costs() -> None:
    for name, (layers, experts, groups) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            write_report(folder, sample(layers, experts, groups), facts(PLAN))
            seconds = time.process_time() - start
            sizes = {file.suffix: 0 for file in Path(folder).iterdir()}
            for file in Path(folder).iterdir():
                sizes[file.suffix] += file.stat().st_size
        shown = ", ".join(f"{suffix} {size / 1e3:.0f} kB" for suffix, size in sorted(sizes.items()))
        print(f"{name:20} {seconds:5.1f} s, {shown}")


def expert_costs() -> None:
    """Returns the seconds of the records' own work and of the whole search, from one run each."""
    own = layer_quantization._identity_loss
    shares = []
    for seed in range(RUNS):
        spent = []

        def timed(*args, spent=spent):
            start = time.process_time()
            result = own(*args)
            spent.append(time.process_time() - start)
            return result

        layer_quantization._identity_loss = timed
        model = tiny_mixtral(hidden_size=512, intermediate_size=1024, num_local_experts=16, seed=seed)
        tokens = torch.randint(3, VOCABULARY, (16, 256), generator=torch.Generator().manual_seed(seed)).tolist()
        recipe = token_recipe(
            dataset=tokens, n_samples=16, max_seq_len=256, batch_tokens=4096, n_grid=20, group_size=128
        )
        start = time.process_time()
        report = quantize_model(model, recipe).hf_quantizer.report
        whole = time.process_time() - start
        shares.append((sum(spent), report.phase_seconds["search"], whole))
    for seconds, search, whole in shares:
        print(
            f"experts' error of the nearest: {seconds:.2f} s of {search:.2f} s of search (wall), {whole:.2f} s in all"
        )
    print(f"median share of all: {statistics.median(s / w for s, _, w in shares):.1%}")


if __name__ == "__main__":
    report_costs()
    expert_costs()
