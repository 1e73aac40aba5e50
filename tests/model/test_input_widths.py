"""What is counted from shapes is what linears read in a forward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import tiny_gemma2, tiny_llama, tiny_mixtral
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_awq_offload.model.experts import expert_parts
from hf_awq_offload.model.fused_experts import take_experts_apart
from hf_awq_offload.model.input_groups import group_equal_inputs
from hf_awq_offload.model.input_widths import expert_input_widths, input_widths
from hf_awq_offload.model.linears import linears_in

SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}


def built(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def read_by_linears(model: PreTrainedModel) -> tuple[nn.Module, list[int]]:
    """Returns the model's first decoder layer, and the widths of the distinct inputs of its linears, sorted."""
    layer = next(part for part in model.modules() if type(part).__name__.endswith(("DecoderLayer", "Layer", "Block")))
    outside = {name: linear for name, linear in linears_in(layer).items() if name not in expert_parts(layer)}
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)  # two norms of one input are the same when a model is made
    inputs: dict[str, Tensor] = {}
    for name, linear in outside.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)))
    model(torch.arange(8)[None])
    return layer, sorted(outside[group[0]].in_features for group in group_equal_inputs(inputs))


@pytest.mark.parametrize(
    "build",
    [
        tiny_llama,  # q and o have one shape
        lambda: tiny_llama(intermediate_size=64),  # and so have gate, up and down
        lambda: tiny_llama(num_attention_heads=2),
        tiny_gemma2,
        lambda: built(OPTConfig(ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=32, **SMALL)),
        lambda: built(GPTNeoXConfig(intermediate_size=96, **SMALL)),
        lambda: built(FalconConfig(**SMALL)),  # attention and the rest read one norm
        lambda: built(BloomConfig(**SMALL)),
        lambda: built(Phi3Config(intermediate_size=96, num_key_value_heads=2, pad_token_id=0, **SMALL)),
        lambda: built(OlmoConfig(intermediate_size=96, pad_token_id=0, **SMALL)),  # its norms have no weights
        lambda: built(BitNetConfig(intermediate_size=96, num_key_value_heads=2, pad_token_id=0, **SMALL)),
    ],
    ids=["llama", "square", "narrow", "gemma2", "opt", "gpt_neox", "falcon", "bloom", "phi3", "olmo", "bitnet"],
)
def test_as_many_inputs_are_counted_as_linears_read(build: Callable[[], PreTrainedModel]):
    layer, read = read_by_linears(build().eval())
    assert sorted(input_widths(layer)) == read


def test_each_expert_has_inputs_of_its_own():
    model = tiny_mixtral()
    take_experts_apart(model, all_kinds=True)
    layer, read = read_by_linears(model)
    assert sorted(input_widths(layer)) == read
    assert sorted(expert_input_widths(layer)) == [64] * 3 + [96] * 3
