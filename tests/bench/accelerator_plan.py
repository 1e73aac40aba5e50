"""Prints what the planner says that layers of well-known shapes take on a GPU, at least and with room to spare.

    python tests/bench/accelerator_plan.py

Arithmetic on shapes alone: no weights, and no GPU. `tests/simulated_gpu/inside/test_memory_bounds.py` compares the
planner with runs on a simulated one.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hf_awq_offload.model.decoder_layers import candidate_layers
from hf_awq_offload.pipeline.budget import Budget, budget_for, reserved_bytes_of, tensor_bytes_within
from hf_awq_offload.pipeline.layer_sizes import LayerSizes

GPU = torch.device("cuda", 0)
GIB, ALL_BYTES = 2**30, 80 * 2**30
TOKENS, LENGTH, GROUP_SIZE = 128 * 512, 512, 128
LIMITS = {
    "usual": {"total_bytes": ALL_BYTES, "free_bytes": ALL_BYTES},
    "max_memory of 8 GB": {"limit_bytes": tensor_bytes_within(8 * 10**9)},
    "least": {"limit_bytes": 1},
}
MODELS = {
    "7B (4096, 11008)": LlamaConfig(num_hidden_layers=1),
    "8B (4096, 14336, grouped queries)": LlamaConfig(
        num_hidden_layers=1, intermediate_size=14336, num_key_value_heads=8
    ),
    "70B (8192, 28672, grouped queries)": LlamaConfig(
        num_hidden_layers=1, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8
    ),
    "30B-A3B (2048, 128 experts of 768)": Qwen3MoeConfig(
        num_hidden_layers=1, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128, decoder_sparse_step=1,
    ),
}  # fmt: skip


def line(name: str, sizes: LayerSizes, budget: Budget) -> str:
    chunk = "usual" if budget.chunk_elements is None else f"2^{budget.chunk_elements.bit_length() - 1}"
    place = "RAM" if budget.statistics_device.type == "cpu" else "GPU"
    place += ", in blocks" if budget.grams_in_ram else ""
    gib = reserved_bytes_of(budget, sizes) / GIB
    return f"| {name} | {gib:.2f} | {budget.batch_tokens} | {place} | {'yes' if budget.prefetch else 'no'} | {chunk} |"


if __name__ == "__main__":
    print("| layer | GiB | tokens at a time | statistics | next layer read ahead | weights at a time |")
    print("|---|---|---|---|---|---|")
    for name, config in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        sizes = LayerSizes.of(candidate_layers(model).values(), GPU, GROUP_SIZE)
        usual = {"prefetch": True, "longest_tokens": LENGTH, "total_tokens": TOKENS}
        for what, limits in LIMITS.items():
            print(line(f"{name}, {what}", sizes, budget_for(sizes, GPU, **usual, **limits)))  # type: ignore[arg-type]
