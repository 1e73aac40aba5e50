"""gpt-oss checkpoints: equal to transformers' `convert_moe_packed_tensors` bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import dequantized, random_bytes, recognize, same_bits
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hf_awq_offload.errors import CheckpointError

NAME = "model.layers.0.mlp.experts.gate_up_proj"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def experts(experts=2, rows=6, groups=3, low=0, high=256):
    return {
        NAME + "_blocks": random_bytes((experts, rows, groups, 16)),
        NAME + "_scales": random_bytes((experts, rows, groups), seed=5, low=low, high=high),
        NAME + "_bias": torch.ones(experts, rows),
    }


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.sampled_from([(0, 256), (110, 132), (0, 3)]))
def test_every_dtype_is_as_transformers_computes_it(count, rows, groups, exponents):
    tensors = experts(count, rows, groups, *exponents)
    for fields in (MXFP4, None):
        result = dequantized(tensors, fields)
        assert list(result) == [NAME]
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            expected = convert_moe_packed_tensors(tensors[NAME + "_blocks"], tensors[NAME + "_scales"], dtype=dtype)
            assert result[NAME].to(dtype).equal(expected) or (exponents[1] == 256 and expected.isnan().any())
            assert same_bits(result[NAME].to(dtype).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_it_is_native_and_biases_stay():
    source = recognize(experts(), MXFP4)
    assert (source.name, source.bits, source.is_native, source.unused) == ("mxfp4", 4, True, ())
    assert source.weights[0].shape == (2, 96, 6)
    assert set(source.weights[0].parts.values()) == {NAME + "_blocks", NAME + "_scales"}


@pytest.mark.parametrize("changed", [
    {NAME + "_scales": None},
    {NAME + "_blocks": None},
    {NAME + "_scales": random_bytes((2, 6, 4))},
    {NAME + "_blocks": random_bytes((2, 6, 3, 8))},
    {NAME + "_blocks": random_bytes((6, 3, 16))},
    {NAME + "_blocks": random_bytes((2, 0, 3, 16)), NAME + "_scales": random_bytes((2, 0, 3))},
    {NAME: torch.ones(2, 96, 6)},
])  # fmt: skip
@pytest.mark.parametrize("fields", [MXFP4, None])
def test_what_contradicts_itself_is_refused(changed, fields):
    tensors = {name: tensor for name, tensor in (experts() | changed).items() if tensor is not None}
    with pytest.raises(CheckpointError, match="gate_up_proj"):
        recognize(tensors, fields)
