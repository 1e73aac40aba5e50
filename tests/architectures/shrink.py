"""Builds tiny random models of every type that transformers knows, from the type's config class alone.

Fields of the default config are shrunk by their *names* (`SIZES`: what a field of that name counts, whatever the
model), lists with one entry per layer are cut down so that every kind of layer stays, and ids of special tokens are
brought into the small vocabulary. `OVERRIDES` holds what can't be told from a name, per model type; it is for tests
alone, the package itself knows no model types.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 200
LARGEST_TEXT_ID = 150
"""Ids above this are special tokens in a shrunk model, which text does not contain."""
MAX_LAYERS = 4
PATCHES_PER_SIDE = 4
"""Patches along each side of an image."""

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EXPERTS = 64, 4, 2, 16, 128, 4

SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (HIDDEN, (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim", "lru_width", "embed_dim",
        "embedding_size", "input_embedding_size", "output_embedding_size", "backbone_hidden_size", "projection_dim",
        "attention_hidden_size", "router_hidden_size", "output_dim", "prompt_mid_dim", "out_hidden_size",
        "cross_attention_hidden_size", "pronunciation_embed_dim", "shape_embed_dim", "ple_embed_dim",
    )),
    (INTERMEDIATE, (
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size", "n_inner", "d_inner",
        "ffn_dim", "ffn_hidden_size", "dim_ff", "dff", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
        "shared_experts_intermediate_size", "shared_intermediate_size", "feed_forward_size", "intermediate_size_mlp",
        "dense_intermediate_size", "moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "mamba_d_ssm",
    )),
    (HEADS, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "attention_heads", "swa_num_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        "linear_num_heads", "index_n_heads", "indexer_num_heads", "linear_num_value_heads",
    )),
    (EXPERTS, ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")),
    (KV_HEADS, (
        "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "n_kv_heads", "num_global_key_value_heads",
        "linear_num_key_heads", "num_query_groups",
    )),
    (HEAD_DIM, (
        "head_dim", "v_head_dim", "qk_nope_head_dim", "dim_head", "swa_head_dim", "linear_head_dim", "global_head_dim",
        "kv_channels", "attention_head_size", "d_head", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head",
        "mamba_head_dim", "mamba_headdim", "index_head_dim", "swa_v_head_dim", "indexer_head_dim", "mamba_d_state",
        "state_size", "ssm_state_size", "laurel_rank", "gated_norm_rank", "hc_lowrank", "d_rel",
        "query_pre_attn_scalar",
        "adapter_rank", "index_topk", "rel_extent", "num_buckets", "position_bias_num_buckets", "relative_max_distance",
        "mamba_dt_rank", "time_step_rank", "hidden_size_per_layer_input", "attention_head_dim",
    )),
    (8, (
        "qk_rope_head_dim", "sliding_window", "window_size", "sliding_window_size", "attention_window_size",
        "local_attention", "local_attention_window_len", "mamba_chunk_size", "chunk_size", "attention_chunk_size",
        "keep_window_size", "mamba_num_heads", "mamba_n_heads", "index_block_size", "rotary_dim", "n_mamba_heads",
    )),
    (24, ("qk_head_dim",)),
    (32, ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_lora_rank")),
    (2, (
        "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "top_k_experts", "o_groups", "expand",
        "index_topk_blocks", "zero_expert_num", "n_groups", "router_topk", "layer_group_size", "mamba_expand",
    )),
    (1, (
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group", "num_dense_layers",
        "first_k_dense_replace", "moe_layer_start_index", "num_expert_group", "max_window_layers", "mamba_n_groups",
        "mamba_ngroups", "num_mem_blocks", "num_nextn_predict_layers",
    )),
    (128, (
        "max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx", "model_max_length",
        "max_sequence_length", "max_target_positions", "max_source_positions", "position_bias_max_distance",
    )),
    (VOCABULARY, (
        "vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size",
        "pronunciation_vocab_size", "shape_vocab_size",
    )),
)  # fmt: skip
SIZE_OF_FIELD = {name: size for size, names in SIZES for name in names}

LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth", "num_layers_per_stack",
)  # fmt: skip

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
"""Rotary embeddings in three directions; the sections add up to half a head."""

SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
          "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": 64, "patch_size": 16}  # fmt: skip
"""A tower for models whose own comes from timm."""

OVERRIDES: dict[str, dict[str, Any]] = {
    **{
        name: {"rope_parameters": MROPE}
        for name in (
            "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "glm4v_text", "glm_ocr_text",
            "glm46v_text", "cosmos3_edge_text",
        )
    },
    "hy_v4_vl_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
    **{name: {"window_size": 56} for name in ("qwen2_5_vl_vision", "exaone4_5_vision", "qwen2_5_omni_vision_encoder")},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 2],
                                    "num_res_blocks": 1, "attn_resolutions": [], "embed_dim": 16,
                                    "latent_channels": 16},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN, "codebook_size": 8},
    "apertus1p5": {"image_token_offset": 162, "audio_token_offset": 170},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 160, "num_query_tokens": 4},
    "chameleon": {"vocabulary_map": {"<image>": 160, "IMGIMGAZ": 161} | {
        f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z": 162 + code for code in range(8)}},
    "chameleon_vqgan": {"num_embeddings": 8, "resolution": 16, "base_channels": 32, "channel_multiplier": [1, 2],
                        "num_res_blocks": 1, "embed_dim": 16, "latent_channels": 16},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128},
    "emu3": {"vocabulary_map": {"<image>": 160, "<|extra_200|>": 161} | {
        f"<|visual token {code:06d}|>": 162 + code for code in range(8)}},
    "emu3_vqgan": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1,
                   "attn_resolutions": []},
    **{name: {"vision_config": SIGLIP} for name in ("fast_vlm", "perception_lm")},
    **{name: {"mm_tokens_per_image": 4} for name in ("gemma3", "shieldgemma2")},
    "gemma4": {"vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "pooling_kernel_size": 2,
        "position_embedding_size": 64}},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 64},
    **{name: {"image_grid_pinpoints": [[128, 128]]} for name in ("llava_next", "llava_next_video")},
    "llava_onevision": {"image_grid_pinpoints": [[64, 64]]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 155},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[0, 0], [1, 1]]},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": MROPE},
    "instructblip": {"num_query_tokens": 4, "image_token_index": 160},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 160},
    "inkling2_vision": {"text_hidden_size": 64, "projection_hidden_dim": 64},
    "inkling2_text": {"unpadded_vocab_size": 200},
    "kimi_k25": {"projection_hidden_size": 256},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "llama4_vision_model": {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64,
                            "intermediate_size": 256},
    "mllama_vision_model": {"vision_output_dim": 128, "num_global_layers": 1},
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "text_hidden_size": 64},
    "nemotron_h_omni": {"projector_hidden_size": 64, "vision_hidden_size": 64},
    "radio": {"video_temporal_patch_size": 2},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 155},
    "step3p5": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_text": {"swa_qk_nope_head_dim": 16, "swa_qk_rope_head_dim": 8, "swa_q_lora_rank": 32,
                        "swa_kv_lora_rank": 32, "swa_head_dim": 24},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "output_gate_type": "sigmoid"},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 48), "local_attn_chunk_length": 8,
                 "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
              "attention_head_dim": 32},
}  # fmt: skip
"""Maps model types to fields whose small value can't be told from their names."""


def shrunk_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Returns the default config of `model_type` with every size made small."""
    return _shrink(CONFIG_MAPPING[model_type], changes)


def tiny_causal_lm(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Builds a random causal language model in evaluation mode, fp32, on the CPU."""
    return _tiny(AutoModelForCausalLM, model_type, seed)


def tiny_image_text(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Builds a random image-text model, like `tiny_causal_lm`."""
    return _tiny(AutoModelForImageTextToText, model_type, seed)


def _tiny(auto_class: Any, model_type: str, seed: int) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = shrunk_config(model_type)
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model


def _shrink(config_class: type[PreTrainedConfig], changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    overrides = OVERRIDES.get(config_class.model_type, {}) | (changes or {})
    try:
        default = config_class()
    except Exception:
        default = config_class(**{name: value for name, value in overrides.items() if not isinstance(value, dict)})
    parameters = {name for name in inspect.signature(config_class.__init__).parameters if name != "self"}
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    values |= {alias: values[name] for alias, name in config_class.attribute_map.items() if name in values}
    fields = {name: shrunk for name, value in values.items() if (shrunk := _shrunk(name, value, values)) is not None}
    fields |= _per_layer(values)
    fields |= _heads(values)
    for name in config_class.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            fields[name] = _shrink(type(sub), overrides.get(name)).to_dict()
    if "is_decoder" in values:
        fields["is_decoder"] = True
    accepts_any = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(config_class.__init__).parameters.values()
    )
    for alias, name in config_class.attribute_map.items():  # a field may go by either name in the signature
        small = fields.get(name, fields.get(alias))
        if small is not None:
            fields |= {key: small for key in (alias, name) if key in values}
    hidden_names = {name for alias, name in config_class.attribute_map.items() if alias in parameters}
    aliases = {alias for alias in config_class.attribute_map if alias not in parameters}
    fields = {
        name: value
        for name, value in fields.items()
        if name in parameters or (accepts_any and name not in aliases and name not in hidden_names)
    }
    for name, value in overrides.items():
        if not isinstance(fields.get(name), dict) or not isinstance(value, dict):
            fields[name] = value
    return config_class(**{name: value for name, value in fields.items() if value is not DROP})


DROP = object()
"""As an override: leave the field to its config class."""


def _shrunk(name: str, value: Any, values: dict[str, Any]) -> Any:
    """Returns the small value of one field, or None to leave it unchanged."""
    if isinstance(value, bool) or value is None:
        return None
    if name.endswith(("token_id", "token_index")) or name in ("mask_index", "unk_index"):
        return _token_id(name, value)
    if name == "image_size" and isinstance(values.get("patch_size"), int):
        side = PATCHES_PER_SIDE * values["patch_size"]
        return side if isinstance(value, int) else [side] * 2 if isinstance(value, list | tuple) else None
    if name.endswith(("indexes", "indices", "attention_layers")) and _are_layers(value):
        return [1]
    if isinstance(value, int) and name in SIZE_OF_FIELD:
        return min(value, SIZE_OF_FIELD[name]) if value > 0 else value
    return None


def _are_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(index) is int for index in value)


def _token_id(name: str, value: Any) -> Any:
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in known:
        return known[name]
    if isinstance(value, int) and value > LARGEST_TEXT_ID:
        return LARGEST_TEXT_ID + 1 + sum(name.encode()) % (VOCABULARY - LARGEST_TEXT_ID - 1)
    return value if isinstance(value, int) else None


def _heads(values: dict[str, Any]) -> dict[str, int]:
    """Shrinks key-value heads: as many as query heads, or one, if the default config has it so."""
    fields = {}
    pairs = (("num_key_value_heads", "num_attention_heads"), ("swa_num_key_value_heads", "swa_num_attention_heads"),
             ("num_kv_heads", "num_attention_heads"), ("linear_num_key_heads", "linear_num_value_heads"))  # fmt: skip
    for kv, query in pairs:
        if isinstance(values.get(kv), int) and isinstance(values.get(query), int):
            ratio = values[query] // max(values[kv], 1)
            fields[kv] = HEADS if ratio <= 1 else 1 if values[kv] == 1 else KV_HEADS
    return fields


def _per_layer(values: dict[str, Any]) -> dict[str, Any]:
    """Reduces the layers, and lists with an entry per layer, so that each combination of entries occurs once."""
    counts = {name: values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)}
    count = max(counts.values(), default=0)
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("_types_unused")
    }
    small = min(count, 2)
    fields: dict[str, Any] = {}
    if lists:
        seen: dict[tuple, int] = {}
        for layer, row in enumerate(zip(*lists.values(), strict=True)):
            seen.setdefault(tuple(map(repr, row)), layer)
        chosen = sorted(seen.values())[:MAX_LAYERS]
        extra = [layer for layer in range(count) if layer not in chosen]
        chosen = sorted(chosen + extra[: max(0, small - len(chosen))])
        small = len(chosen)
        fields |= {name: [entries[layer] for layer in chosen] for name, entries in lists.items()}
    return fields | {name: min(value, small) for name, value in counts.items()}


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Randomizes the weights so that every one matters, also those that transformers sets to zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            fan_in = parameter.shape[-1] if parameter.ndim else 1
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise)
            elif isinstance(module, nn.Linear) and name == "weight":
                parameter.copy_(noise * fan_in**-0.5)
            elif parameter.ndim == 3 and "conv" not in name and not isinstance(module, nn.Conv1d | nn.Conv2d):
                parameter.copy_(noise * 0.125)
            elif parameter.ndim < 2 or not torch.isfinite(parameter).all() or parameter.std() < 0.05:
                base = parameter if torch.isfinite(parameter).all() else torch.zeros_like(parameter)
                parameter.copy_(base + 0.1 * noise)


def text_ids(sequences: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Returns random token ids from the text part of the vocabulary, (sequences, tokens) int64."""
    return torch.randint(4, LARGEST_TEXT_ID, (sequences, tokens), generator=torch.Generator().manual_seed(seed))
