"""Makes one checkpoint of each kind that servers are asked to read: a random model and a recipe.

Beside each checkpoint stands the model in full precision, NAME-source. Prompts are in `prompts.json`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_awq_offload import AwqOffloadConfig, quantize

VOCABULARY = 512
# Heads of 64 and sides of 256 and more: what attention and int4 kernels of servers ask for.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 48, 32
SOURCE = "-source"


@dataclass
class Kind:
    """A checkpoint that servers are asked to read.

    Attributes:
        model: Builds the model, in bf16.
        fields: Fields of the recipe beside the data.
        columns: Its model and its format, as the table has them.
    """

    model: Callable[[], PreTrainedModel]
    fields: dict[str, Any]
    columns: tuple[str, str]

    @property
    def name(self) -> str:
        return "-".join(self.columns).replace(" ", "_").replace(",", "")


def llama() -> PreTrainedModel:
    return _built(LlamaForCausalLM, LlamaConfig(**SHAPE))


def qwen3() -> PreTrainedModel:
    return _built(Qwen3ForCausalLM, Qwen3Config(**SHAPE))


def neox() -> PreTrainedModel:
    others = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
    return _built(GPTNeoXForCausalLM, GPTNeoXConfig(**others))


def mixtral() -> PreTrainedModel:
    return _built(MixtralForCausalLM, MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe(experts: int) -> Callable[[], PreTrainedModel]:
    sizes = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    return lambda: _built(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **sizes, mlp_only_layers=[]))


def _built(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config).eval().to(torch.bfloat16)


AWQ = {"format": "awq"}
COMPRESSED = {"format": "compressed-tensors", "zero_point": False}
FORMATS: dict[str, dict[str, Any]] = {
    "AWQ": AWQ,
    "AWQ, symmetric": {**AWQ, "zero_point": False},
    "AWQ, groups of 32": {**AWQ, "group_size": 32},
    "AWQ, one group": {**AWQ, "group_size": -1},
    "compressed-tensors, 4 bits": COMPRESSED,
    "compressed-tensors, 4 bits, zero points": {**COMPRESSED, "zero_point": True},
    "compressed-tensors, 4 bits, groups of 32": {**COMPRESSED, "group_size": 32},
    "compressed-tensors, 4 bits, one group": {**COMPRESSED, "group_size": -1},
    "compressed-tensors, 8 bits": {**COMPRESSED, "bits": 8},
}
TWO_FORMATS = ("AWQ", "compressed-tensors, 4 bits")
LEFT_OUT = {"modules_to_not_convert": [r"model\.layers\.0\.self_attn", r"model\.layers\.1\.mlp"]}
EXPERTS_LEFT_OUT = {"modules_to_not_convert": [r"model\.layers\.0\.self_attn", r"model\.layers\.1\.mlp\.experts"]}


def kinds() -> Iterator[Kind]:
    """Yields every kind: a dense model in all formats, the others in one of each family."""
    for title, fields in FORMATS.items():
        yield Kind(llama, fields, ("Llama", title))
    two: list[tuple[str, Callable[[], PreTrainedModel], dict[str, Any]]] = [
        ("Llama, partly left out", llama, LEFT_OUT),
        ("Qwen3", qwen3, {}),
        ("GPT-NeoX", neox, {}),
        ("Mixtral, 4 experts", mixtral, {}),
        *((f"Qwen3-MoE, {experts} experts", qwen3_moe(experts), {}) for experts in (4, 8, 32, 128)),
        ("Qwen3-MoE, 8 experts, partly left out", qwen3_moe(8), EXPERTS_LEFT_OUT),
    ]
    for title, model, changes in two:
        for format_title in TWO_FORMATS:
            yield Kind(model, {**FORMATS[format_title], **changes}, (title, format_title))


def make(kind: Kind, folder: Path) -> None:
    """Writes the checkpoint of `kind` to `folder`, with prompts, and its source beside it."""
    data = torch.randint(3, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(1)).tolist()
    recipe = AwqOffloadConfig(
        dataset=data, n_samples=8, max_seq_len=64, n_grid=3, clip=False, rounding="nearest", **kind.fields
    )
    source = folder.with_name(folder.name + SOURCE)
    kind.model().save_pretrained(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about readers that can't take it: here they are asked
        quantize(str(source), str(folder), recipe)
    prompts = torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2))
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts.tolist(), "new_tokens": NEW_TOKENS}))
