"""Compares the seconds of probing with the rest of a run, on real shapes: `python tests/bench/probe_cost.py`."""

from __future__ import annotations

import time
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_awq_offload import AwqOffloadConfig, quantize_model
from hf_awq_offload.pipeline.structures import Structures

HIDDEN, INTERMEDIATE, LAYERS, TOKENS = 1024, 2816, 4, 16384


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, vocab_size=1000,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 1000, (TOKENS // 512, 512), generator=generator).tolist()
    seconds = []
    structure_of = Structures.of

    def timed(*args):
        start = time.perf_counter()
        result = structure_of(*args)
        seconds.append(time.perf_counter() - start)
        return result

    with mock.patch.object(Structures, "of", timed):
        start = time.perf_counter()
        quantize_model(model, AwqOffloadConfig(dataset=data, n_samples=len(data)))
        total = time.perf_counter() - start
    print(f"{LAYERS} layers, hidden {HIDDEN}, {TOKENS} tokens: {total:.1f} s, of which probing {sum(seconds):.2f} s")
    print(f"share {sum(seconds) / total:.1%}; first layer {seconds[0]:.2f} s, each later one {seconds[-1]:.2f} s")


if __name__ == "__main__":
    main()
