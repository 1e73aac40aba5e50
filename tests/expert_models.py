"""Builds tiny random mixtures of experts whose checkpoints hold the experts one by one."""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 64, 32, 10
SHAPE = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **SHAPE)).eval()


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, mlp_only_layers=[], **SHAPE)
    return Qwen3MoeForCausalLM(config).eval()
