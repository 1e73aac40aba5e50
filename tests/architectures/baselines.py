"""Lists which linears other tools scale, for the table in docs/architectures.md.

Written down from `awq/models/<type>.py` (`get_layers_for_scaling`) of AutoAWQ 0.2.9, and from `mappings.py` and
`dynamic_mappings.py` in `modifiers/transform/awq` of llm-compressor 0.14.0.1: which linears they scale, as suffixes of
names. Those mappings of both are here whose model type transformers has itself; llm-compressor's go by the name of the
model's class. Types that it gives its default mapping for want of one are not.

`v_proj=o_proj`: o_proj is scaled where v_proj has a weight of the same shape (AutoAWQ's condition; grouped queries and
heads wider than the hidden size both break it). `v_proj>o_proj`: where v_proj has as many outputs as o_proj has inputs
(llm-compressor's), and thrice as many if it is a `qkv_proj`. Linears after a GELU that AutoAWQ scales by putting a
module of its own around the activation count as scaled there.
"""

from __future__ import annotations

import re

import torch
from shrink import shrunk_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_awq_offload.model.decoder_layers import candidate_layers
from hf_awq_offload.model.fused_experts import take_experts_apart
from hf_awq_offload.model.linears import linears_in

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LATENT = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", *_MLP)
_BLOOM = ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")
_SAME_SHAPE = (*_QKV, "v_proj=o_proj", *_MLP)
_SAME_WIDTH = (*_QKV, "v_proj>o_proj", *_MLP)
_NO_NORMS = ("v_proj>o_proj", "down_proj")
_EXPERTS_ONLY = (*_QKV, "v_proj>o_proj", "experts.*.gate_proj", "experts.*.up_proj", "down_proj")
_HYBRID = (*_QKV, "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", *_MLP)

_AUTOAWQ_CAUSAL_LM: dict[str, tuple[str, ...]] = {
    "bloom": _BLOOM,
    "cohere": _SAME_SHAPE,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": ("query_key_value", "dense_h_to_4h"),
    "gemma": _SAME_SHAPE,
    "gemma2": _SAME_SHAPE,
    "gpt_bigcode": ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": _BLOOM,
    "gptj": (*_QKV, "fc_in", "out_proj", "fc_out"),
    "llama": _SAME_SHAPE,
    "minicpm3": ("q_b_proj", "kv_b_proj", *_MLP),
    "mistral": _SAME_SHAPE,
    "mixtral": (*_QKV, "v_proj=o_proj", "w1", "w2", "w3"),
    "mpt": ("Wqkv", "out_proj", "up_proj", "down_proj"),
    "opt": (*_QKV, "out_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2": _SAME_SHAPE,
    "qwen3": _SAME_SHAPE,
    "qwen3_moe": _SAME_SHAPE,
    "stablelm": _SAME_SHAPE,
    "starcoder2": (*_QKV, "v_proj=o_proj", "c_fc", "c_proj"),
}
_LLM_COMPRESSOR_CAUSAL_LM: dict[str, tuple[str, ...]] = {
    "afmoe": _SAME_WIDTH,
    "bloom": _BLOOM,
    "cohere": _SAME_WIDTH,
    "cohere2": _SAME_WIDTH,
    "cohere2_moe": _SAME_WIDTH,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": _SAME_WIDTH,
    "exaone4": _NO_NORMS,
    "gemma2": _SAME_WIDTH,
    "gemma3_text": ("v_proj>o_proj", *_MLP),
    "glm4_moe": _EXPERTS_ONLY,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "granite": _SAME_WIDTH,
    "internlm3": _SAME_WIDTH,
    "iquestcoder": _SAME_WIDTH,
    "llama": _SAME_WIDTH,
    "mistral": _SAME_WIDTH,
    "olmo": _NO_NORMS,
    "olmo3": _NO_NORMS,
    "phi3": ("qkv_proj", "qkv_proj>o_proj", "gate_up_proj", "down_proj"),
    "qwen2": _SAME_WIDTH,
    "qwen2_moe": _EXPERTS_ONLY,
    "qwen3": _SAME_WIDTH,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_moe": _EXPERTS_ONLY,
    "qwen3_next": _HYBRID,
    "seed_oss": _SAME_WIDTH,
}


AUTOAWQ = {
    "causal_lm": _AUTOAWQ_CAUSAL_LM,
    # AutoAWQ's qwen2_5_omni scales the layers of its thinker.
    "image_text": dict.fromkeys(("llava", "llava_next", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"), _SAME_SHAPE),
}
LLM_COMPRESSOR = {
    "causal_lm": _LLM_COMPRESSOR_CAUSAL_LM,
    "image_text": {
        "cohere2_vision": _SAME_WIDTH,
        "gemma3": ("v_proj>o_proj", *_MLP),
        "mistral3": _SAME_WIDTH,
        "muse_glimmer": _SAME_WIDTH,
        "qwen2_5_omni_thinker": _SAME_WIDTH,
        "qwen2_5_vl": _SAME_WIDTH,
        "qwen3_5": _HYBRID,
        "qwen3_5_moe": _HYBRID,
    },
}


def shares(suite: str, model_type: str) -> tuple[float | None, float | None]:
    """Returns the share of decoder-layer linears that AutoAWQ and llm-compressor scale; None without a mapping."""
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
    condition = re.search("[=>]", rule)
    consumer = rule[condition.end() :] if condition else rule
    parts, wanted = name.split("."), consumer.split(".")
    same = len(parts) >= len(wanted) and all(w in ("*", p) for p, w in zip(parts[-len(wanted) :], wanted, strict=True))
    if not same or not condition:
        return same
    producer = rule[: condition.start()]
    feeding = linears.get(".".join([*parts[:-1], producer]))
    if feeding is None:
        return False
    if condition[0] == "=":
        return feeding.weight.shape == linears[name].weight.shape
    return feeding.out_features == linears[name].in_features * (3 if producer == "qkv_proj" else 1)


def _decoder_layers(suite: str, model_type: str) -> list[nn.Module]:
    auto_class = AutoModelForCausalLM if suite == "causal_lm" else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto_class.from_config(shrunk_config(model_type))
    take_experts_apart(model, all_kinds=True)
    return list(candidate_layers(model if suite == "causal_lm" else model.get_decoder()).values())
