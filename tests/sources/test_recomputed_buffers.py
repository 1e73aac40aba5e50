"""Buffers that old checkpoints hold and models compute anew are not kept."""

from __future__ import annotations

import pytest

from hf_awq_offload.integrations.carrying import carried_names


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.causal_mask",
        "transformer.h.0.self_attention.maybe_rotary.inv_freq",
    ],
)
def test_a_buffer_is_left_out(name):
    assert carried_names([name]) == []


@pytest.mark.parametrize("name", ["mtp.layers.0.self_attn.qkv.bias", "model.layers.2.eh_proj.weight"])
def test_a_weight_is_kept(name):
    assert carried_names([name]) == [name]
