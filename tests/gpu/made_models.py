"""Makes models of any shape with random weights, quickly: the numbers are drawn on the device.

Some input channels of each linear are louder than others, as in trained models, so that the searches have something to
find. Losses mean nothing all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig

SHAPE_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SHAPE_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 2000,
}
SHAPE_MEMORY = SHAPE_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 2000,
}
SHAPE_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 320,
}
SHAPE_EXPERTS = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 2000,
}
SHAPE_EXPERTS_SMALL = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
}


def llama_config(layers: int, shape: Mapping[str, Any]) -> LlamaConfig:
    config = LlamaConfig(
        num_hidden_layers=layers, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16", **shape
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def random_llama(layers: int, shape: Mapping[str, Any]) -> PreTrainedModel:
    """Returns a model in bf16, on the CPU."""
    return with_random_weights(llama_config(layers, shape))


def with_random_weights(config: PretrainedConfig) -> PreTrainedModel:
    """Returns a model of `config` in bf16, on the CPU."""
    with torch.device("cuda"):  # where transformers' own initialization takes no time
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_random(parameter.shape))
    model.to("cpu")
    torch.cuda.empty_cache()
    return model


def write_llama(folder: Path, layers: int, shape: Mapping[str, Any], *, repeats_one: bool = False) -> Path:
    """Writes a checkpoint layer by layer, with one layer in RAM at a time.

    With `repeats_one` all layers have the same weights, which are drawn once.
    """
    config = llama_config(layers, shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    drawn: dict[str, Tensor] = {}
    for index in range(-1, layers):  # -1: what is outside of the layers
        prefix = f"model.layers.{index}."
        names = [name for name in shapes if (name.startswith(prefix) if index >= 0 else ".layers." not in name)]
        if not (repeats_one and index > 0):
            drawn = {name.removeprefix(prefix): _random(shapes[name]).cpu() for name in names}
        file = f"model-{index + 2:05}-of-{layers + 1:05}.safetensors"
        save_file({name: drawn[name.removeprefix(prefix)] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def _random(shape: torch.Size) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    values = torch.randn(shape, device="cuda", dtype=torch.float32).mul_(shape[-1] ** -0.5)
    loud = torch.randn(shape[-1], device="cuda").mul_(0.5).exp_()
    return values.mul_(loud).to(torch.bfloat16)


def recipe(vocabulary: int, samples: int, length: int, **changes: Any) -> AwqOffloadConfig:
    """Returns the default recipe on random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary, (samples, length), generator=generator).tolist()
    return AwqOffloadConfig(**{"dataset": tokens, "n_samples": samples, "max_seq_len": length} | changes)
