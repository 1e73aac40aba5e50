"""What the mappings of other tools give scales to, for the table in docs/architectures.md.

Written down from AutoAWQ's `awq/models/<type>.py` (`get_layers_for_scaling`) and llm-compressor's
`modifiers/awq/mappings.py`: which linears they scale, as suffixes of names. Both leave out v → o where the value rows
are fewer than the inputs of o (grouped queries). Linears after a GELU that AutoAWQ scales by putting a module of its
own around the activation count as scaled there.
"""

from __future__ import annotations

import torch
from shrink import shrunk_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_awq_offload.experts import is_fused_experts, original_projections, unfused
from hf_awq_offload.layers import candidate_layers
from hf_awq_offload.linears import linears_in

_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = (*_QKV, "v_proj>o_proj", "gate_proj", "up_proj", "down_proj")
_EXPERTS_ONLY = (*_QKV, "v_proj>o_proj", "experts.*.gate_proj", "experts.*.up_proj", "down_proj")
_LATENT = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "down_proj")
_PHI = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

_AUTOAWQ_CAUSAL_LM: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "cohere": _LLAMA,
    "deepseek_v3": _LATENT,
    "falcon": ("query_key_value", "dense_h_to_4h"),
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gpt_neox": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "gptj": (*_QKV, "fc_in", "v_proj>out_proj", "fc_out"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": (*_QKV, "v_proj>o_proj", "w1", "w2", "w3"),
    "opt": (*_QKV, "v_proj>out_proj", "fc1", "fc2"),
    "phi3": _PHI,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _EXPERTS_ONLY,
}
_LLM_COMPRESSOR_CAUSAL_LM: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": _LLAMA,
    "exaone4": ("v_proj>o_proj", "down_proj"),
    "gemma2": _LLAMA,
    "glm4_moe": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo3": ("v_proj>o_proj", "down_proj"),
    "phi3": _PHI,
    "qwen2": _LLAMA,
    "qwen2_moe": _EXPERTS_ONLY,
    "qwen3": _LLAMA,
    "qwen3_moe": _EXPERTS_ONLY,
    "qwen3_next": (*_QKV, "v_proj>o_proj", "gate_proj", "up_proj", "down_proj"),
    "seed_oss": _LLAMA,
}


AUTOAWQ = {
    "causal_lm": _AUTOAWQ_CAUSAL_LM,
    "image_text": dict.fromkeys(("llava", "llava_next", "qwen2_5_vl", "qwen2_vl"), _LLAMA),
}
LLM_COMPRESSOR = {
    "causal_lm": _LLM_COMPRESSOR_CAUSAL_LM,
    "image_text": dict.fromkeys(("cohere2_vision", "gemma3", "mistral3", "qwen2_5_omni_thinker"), _LLAMA),
}


def shares(suite: str, model_type: str) -> tuple[float | None, float | None]:
    """Share of the linears of the decoder layers that (AutoAWQ, llm-compressor) scale; None: no mapping for it."""
    layers = _decoder_layers(suite, model_type)
    return tuple(
        None if mapping is None else _share(layers, mapping)
        for mapping in (AUTOAWQ[suite].get(model_type), LLM_COMPRESSOR[suite].get(model_type))
    )


def _share(layers, mapping: tuple[str, ...]) -> float:
    scaled = total = 0
    for layer in layers:
        linears = {name: linear for name, linear in linears_in(layer).items() if linear.out_features % 8 == 0}
        total += len(linears)
        scaled += sum(any(_is_scaled(name, linears, rule) for rule in mapping) for name in linears)
    return scaled / total


def _is_scaled(name: str, linears: dict[str, nn.Linear], rule: str) -> bool:
    producer, _, consumer = rule.rpartition(">")
    parts, wanted = name.split("."), consumer.split(".")
    same = len(parts) >= len(wanted) and all(w in ("*", p) for p, w in zip(parts[-len(wanted) :], wanted, strict=True))
    if not same or not producer:
        return same
    feeding = linears.get(".".join([*parts[:-1], producer]))
    return feeding is not None and feeding.out_features == linears[name].in_features


def _decoder_layers(suite: str, model_type: str) -> list[nn.Module]:
    auto_class = AutoModelForCausalLM if suite == "causal_lm" else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto_class.from_config(shrunk_config(model_type))
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    for name, module in list(model.named_modules()):
        if is_fused_experts(module):
            model.set_submodule(name, unfused(module, original_projections(name, module, conversions)))
    return list(candidate_layers(model if suite == "causal_lm" else model.get_decoder()).values())
