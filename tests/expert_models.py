"""Builds tiny random mixtures of experts: of types with transformers' experts interface, and without."""

from __future__ import annotations

import torch
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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


def llama4() -> Llama4ForCausalLM:
    """Experts get their tokens in equal groups, with zeros for those of others."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_experts_per_tok": 1, "intermediate_size": 64}
    config = Llama4TextConfig(num_local_experts=EXPERTS, intermediate_size_mlp=64, interleave_moe_layer_step=1, **shape)
    return Llama4ForCausalLM(config).eval()


def dbrx() -> DbrxForCausalLM:
    """One matrix holds the rows of all experts, and another module than its owner cuts it up."""
    torch.manual_seed(0)
    experts = {"ffn_hidden_size": 64, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": HIDDEN}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    config = DbrxConfig(
        vocab_size=64, d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=64, attn_config=attention, ffn_config=experts
    )
    return DbrxForCausalLM(config).eval()


def jetmoe() -> JetMoeForCausalLM:
    """A module for each projection takes rows that are sorted by expert; attention has experts, too."""
    torch.manual_seed(0)
    config = JetMoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return JetMoeForCausalLM(config).eval()


def longcat_flash() -> LongcatFlashForCausalLM:
    """Tokens may choose experts without weights, for which one of two fused parameters has unused slices."""
    torch.manual_seed(0)
    config = LongcatFlashConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=64,
        num_layers=1,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        head_dim=16,
        n_routed_experts=EXPERTS,
        zero_expert_num=2,
        moe_topk=2,
        max_position_embeddings=64,
    )
    return LongcatFlashForCausalLM(config).eval()


WITHOUT_INTERFACE = (llama4, dbrx, jetmoe, longcat_flash)


def saved(model: PreTrainedModel, folder) -> None:
    """Saves a model in bf16, with weights large enough that quantizing them shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    model.to(torch.bfloat16).save_pretrained(folder)
