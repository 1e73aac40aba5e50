"""Builds tiny random models and linears for several test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_awq_offload import AwqOffloadConfig
from hf_awq_offload.formats.awq import pack_weight
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range, quantize
from hf_awq_offload.nn.awq_linear import AwqLinear

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(**changes: Any) -> PreTrainedModel:
    return _build(LlamaForCausalLM, LlamaConfig, **changes)


def tiny_qwen2(**changes: Any) -> PreTrainedModel:
    return _build(Qwen2ForCausalLM, Qwen2Config, **changes)


def tiny_qwen3(**changes: Any) -> PreTrainedModel:
    return _build(Qwen3ForCausalLM, Qwen3Config, **changes)


def tiny_gemma(**changes: Any) -> PreTrainedModel:
    return _build(GemmaForCausalLM, GemmaConfig, **changes)


def tiny_gemma2(**changes: Any) -> PreTrainedModel:
    """Even layers attend to the last 8 tokens, odd ones to all."""
    return _build(Gemma2ForCausalLM, Gemma2Config, **{"sliding_window": 8} | changes)


def tiny_gemma3(**changes: Any) -> PreTrainedModel:
    """The first layer attends to the last 8 tokens, the second to all, with another rotary base."""
    return _build(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]} | changes,
    )


def tiny_mixtral(**changes: Any) -> PreTrainedModel:
    """A model whose checkpoints hold experts one by one."""
    return _build(MixtralForCausalLM, MixtralConfig, **{"num_local_experts": 3} | changes)


def tiny_ernie_moe(**changes: Any) -> PreTrainedModel:
    """A model whose routers stay in fp32 whatever its dtype."""
    sizes = {"moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 0}
    return _build(Ernie4_5_MoeForCausalLM, Ernie4_5_MoeConfig, **sizes | changes)


def tiny_gpt_oss(**changes: Any) -> PreTrainedModel:
    """A model whose checkpoints hold experts fused, and whose norms stay in fp32."""
    return _build(GptOssForCausalLM, GptOssConfig, **{"num_local_experts": 3, "num_experts_per_tok": 2} | changes)


def _build(model_class: type[PreTrainedModel], config_class: type, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Builds a model in fp32 and evaluation mode; norms and biases are random too, not ones and zeros."""
    torch.manual_seed(seed)
    model = model_class(config_class(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_batch(sequences: int, tokens: int, seed: int = 0) -> Tensor:
    """Returns random token ids, (sequences, tokens)."""
    return torch.randint(3, VOCABULARY, (sequences, tokens), generator=torch.Generator().manual_seed(seed))


def random_awq_linear(
    in_features: int = 64,
    out_features: int = 24,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    group_size: int = 32,
    zero_point: bool = True,
    seed: int = 0,
) -> AwqLinear:
    """Returns a quantized linear with random weights."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(4, group_size, zero_point)
    weight = torch.randn(out_features, in_features, generator=generator)
    parameters = group_parameters(group_range(weight, grid), grid)
    packed = pack_weight(quantize(weight, parameters, grid), parameters)
    values = torch.randn(out_features, generator=generator) if bias else None
    return AwqLinear.from_packed(packed, values, grid, dtype)


def dense_twin(linear: AwqLinear, dtype: torch.dtype) -> nn.Linear:
    """Returns a dense linear with the dequantized weight of `linear`."""
    dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(linear.weight)
        if linear.bias is not None:
            dense.bias.copy_(linear.bias)
    return dense


def save_model(model: PreTrainedModel, directory: Path) -> Path:
    """Saves a model without a tokenizer, since calibration is on token ids."""
    model.save_pretrained(directory)
    return directory


def token_recipe(**changes: Any) -> AwqOffloadConfig:
    """Returns a recipe with few short sequences of token ids, few candidates, and two sequences per micro-batch."""
    fields = {
        "dataset": token_batch(6, 20).tolist(),
        "n_samples": 6,
        "max_seq_len": 20,
        "batch_tokens": 40,
        "group_size": 32,
        "n_grid": 3,
    }
    return AwqOffloadConfig(**fields | changes)
