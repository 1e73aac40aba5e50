"""Makes checkpoints with a layer for multi-token prediction (MTP), and computes what enters that layer, slowly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import SHAPE, save_model, tiny_qwen2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

HIDDEN = SHAPE["hidden_size"]
EXPERTS = 2


def tiny_glm4_moe() -> PreTrainedModel:
    """The first layer is dense, the others have experts."""
    return _built(
        Glm4MoeForCausalLM,
        Glm4MoeConfig(
            **SHAPE, n_routed_experts=EXPERTS, num_experts_per_tok=1, moe_intermediate_size=64, first_k_dense_replace=1,
            n_shared_experts=1, n_group=1, topk_group=1, use_qk_norm=True,
        ),
    )  # fmt: skip


def tiny_qwen3_next() -> PreTrainedModel:
    """The first layer has linear attention, the second full attention; both have experts. Norms multiply by 1 + w."""
    return _built(
        Qwen3NextForCausalLM,
        Qwen3NextConfig(
            **SHAPE, num_experts=EXPERTS, num_experts_per_tok=1, moe_intermediate_size=64,
            shared_expert_intermediate_size=64, layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        ),
    )  # fmt: skip


def _built(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@dataclass(frozen=True)
class MtpSource:
    """A model, and how its checkpoint names the layer for multi-token prediction."""

    build: Callable[[], PreTrainedModel]
    layer: str
    projection: str
    embedding_norm: str
    hidden_norm: str
    others: dict[str, tuple[int, ...]]
    """More tensors of the kind, which the layer's inputs do not depend on."""
    count: str
    """The field of config.json that counts such layers."""
    adds_one: bool = False
    """Whether norms multiply by 1 + w."""

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Saves the checkpoint; the layer for multi-token prediction has the shapes of the last decoder layer."""
        save_model(self.build().to(dtype), folder)
        tensors = load_file(folder / "model.safetensors")
        last = f"model.layers.{SHAPE['num_hidden_layers'] - 1}."
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int, around: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * 0.1 + around).to(dtype)

        for name, value in list(tensors.items()):
            if name.startswith(last):
                around = 1.0 - self.adds_one if "norm" in name else 0.0
                tensors[name.replace(last, f"{self.layer}.")] = drawn(*value.shape, around=around)
        tensors[f"{self.projection}.weight"] = drawn(HIDDEN, 2 * HIDDEN)
        for norm in (self.embedding_norm, self.hidden_norm):
            tensors[f"{norm}.weight"] = drawn(HIDDEN, around=1.0)
        for name, shape in self.others.items():
            tensors[name] = drawn(*shape, around=float(len(shape) == 1))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {self.count: 1}))
        return folder

    def inputs(self, folder: Path, token_ids: Tensor) -> Tensor:
        """Returns what enters the layer, (sequences, tokens - 1, hidden): the last token has no successor."""
        model = AutoModelForCausalLM.from_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        embeddings = f"{self.layer}.embed_tokens.weight"
        table = tensors.get(embeddings, model.get_input_embeddings().weight)
        with torch.no_grad():
            hidden = model.model(token_ids).last_hidden_state[:, :-1]
        joined = [
            self._norm(value, tensors[f"{norm}.weight"], model.config.rms_norm_eps)
            for value, norm in (
                (nn.functional.embedding(token_ids[:, 1:], table), self.embedding_norm),
                (hidden, self.hidden_norm),
            )
        ]
        return (torch.cat(joined, dim=-1) @ tensors[f"{self.projection}.weight"].T).detach()

    def _norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (weight + self.adds_one)

    def outputs(self, folder: Path, tensors: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Runs the layer with tensors of the checkpoint in full precision, (sequences, tokens, hidden)."""
        model = AutoModelForCausalLM.from_pretrained(folder)
        layer = copy.deepcopy(model.model.layers[-1])
        state = {name.removeprefix(f"{self.layer}."): value for name, value in tensors.items()}
        state = {name: value for name, value in state.items() if name in layer.state_dict() or ".experts." in name}
        experts = {name: state.pop(name) for name in list(state) if ".experts." in name}
        if experts:
            weight = {
                part: [experts[f"mlp.experts.{expert}.{part}_proj.weight"] for expert in range(EXPERTS)]
                for part in ("gate", "up", "down")
            }
            both = [torch.cat(pair) for pair in zip(weight["gate"], weight["up"], strict=True)]
            state["mlp.experts.gate_up_proj"] = torch.stack(both)
            state["mlp.experts.down_proj"] = torch.stack(weight["down"])
        layer.load_state_dict(state)
        positions = torch.arange(inputs.shape[1]).unsqueeze(0)
        with torch.no_grad():
            embedded = model.model.rotary_emb(inputs, positions)
            result = layer(inputs, position_embeddings=embedded, attention_mask=None)
        return result if isinstance(result, Tensor) else result[0]


def _beyond(build: Callable[[], PreTrainedModel], **others: tuple[int, ...]) -> MtpSource:
    layer = f"model.layers.{SHAPE['num_hidden_layers']}"
    return MtpSource(
        build,
        layer,
        projection=f"{layer}.eh_proj",
        embedding_norm=f"{layer}.enorm",
        hidden_norm=f"{layer}.hnorm",
        others={f"{layer}.shared_head.norm.weight": (HIDDEN,)}
        | {f"{layer}.{name.replace('__', '.')}.weight": shape for name, shape in others.items()},
        count="num_nextn_predict_layers",
    )


TABLE = (SHAPE["vocab_size"], HIDDEN)
SOURCES = {
    "qwen2": _beyond(tiny_qwen2),
    "glm4_moe": _beyond(tiny_glm4_moe, embed_tokens=TABLE, shared_head__head=TABLE),
    "qwen3_next": MtpSource(
        tiny_qwen3_next,
        layer="mtp.layers.0",
        projection="mtp.fc",
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        others={"mtp.norm.weight": (HIDDEN,)},
        count="mtp_num_hidden_layers",
        adds_one=True,
    ),
}
