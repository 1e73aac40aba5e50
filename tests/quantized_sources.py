"""Writes tiny checkpoints whose weights are quantized as published checkpoints are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

FP8_MAX = 448.0
Stored = dict[str, Tensor]


def save_quantized(
    model: PreTrainedModel,
    folder: Path,
    store: Callable[[str, Tensor], Stored | None],
    fields: dict[str, Any] | None,
    shards: int = 1,
) -> Path:
    """Saves a model in bf16 with some of its tensors stored otherwise.

    Args:
        model: the model.
        folder: where.
        store: name and value of a tensor -> what is stored in its place; None: the tensor itself.
        fields: the quantization_config of config.json.
        shards: number of files, among which the tensors go round, so that parts of a weight are apart.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors: Stored = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensors |= store(name, value) or {name: value}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        _save_shards(folder, tensors, shards)
    if fields is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    return folder


def _save_shards(folder: Path, tensors: Stored, shards: int) -> None:
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fp8_blocks(block: int) -> tuple[Callable[[str, Tensor], Stored | None], dict[str, Any]]:
    """Stores projections in FP8 with a scale per block, as DeepSeek-V3 and Qwen3 do."""

    def store(name: str, value: Tensor) -> Stored | None:
        if not name.endswith("_proj.weight"):
            return None
        blocks = value.float().unfold(0, block, block).unfold(1, block, block)
        scale = blocks.abs().amax((-1, -2)) / FP8_MAX
        full = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        return {name: (value.float() / full).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    fields = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return store, fields


def mxfp4_experts(name: str, value: Tensor) -> Stored | None:
    """Stores fused experts in MXFP4 of random values, as gpt-oss does."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    experts, inner, out = value.shape
    generator = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 122, (experts, out, inner // 32), dtype=torch.uint8, generator=generator)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


MXFP4_FIELDS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def fp8_per_tensor(name: str, value: Tensor) -> Stored | None:
    """Stores projections in FP8 with one scale each, and a scale of the activations."""
    if not name.endswith("_proj.weight"):
        return None
    scale = value.float().abs().max() / FP8_MAX
    stored = {name: (value.float() / scale).to(torch.float8_e4m3fn), name.replace(".weight", ".weight_scale"): scale}
    return stored | {name.replace(".weight", ".input_scale"): torch.tensor(1.0)}
