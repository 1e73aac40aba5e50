"""bitsandbytes checkpoints, built from the description of the format and read value by value."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import dequantized, random_bytes, recognize, same_bits, uniform

from hf_awq_offload.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj.weight"
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def state_bytes(state: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def four_bits(shape=(6, 10), blocksize=64, dtype="bfloat16", nested=False, kind="nf4", nested_blocksize=256) -> dict:
    numel = torch.Size(shape).numel()
    blocks = -(-numel // blocksize)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    tensors = {
        NAME: random_bytes((-(-numel // 2), 1)),
        f"{NAME}.quant_map": torch.linspace(-1, 1, 16) ** 3,
        f"{NAME}.absmax": uniform((blocks,)),
    }
    if nested:
        state |= {"nested_blocksize": nested_blocksize, "nested_dtype": "float32", "nested_offset": 0.0371}
        tensors[f"{NAME}.absmax"] = random_bytes((blocks,), 7)
        tensors[f"{NAME}.nested_absmax"] = uniform((-(-blocks // nested_blocksize),), 8)
        tensors[f"{NAME}.nested_quant_map"] = torch.linspace(-1, 1, 256)
    tensors[f"{NAME}.quant_state.bitsandbytes__{kind}"] = state_bytes(state)
    return tensors


def value_by_value(tensors: dict, shape, blocksize, nested_blocksize=256) -> torch.Tensor:
    """fp32: the upper half of a byte comes first."""
    values = []
    for byte in tensors[NAME].flatten().tolist():
        values += [tensors[f"{NAME}.quant_map"][byte >> 4], tensors[f"{NAME}.quant_map"][byte & 15]]
    result = torch.empty(torch.Size(shape).numel())
    for i in range(result.numel()):
        block = i // blocksize
        absmax = tensors[f"{NAME}.absmax"][block]
        if f"{NAME}.nested_absmax" in tensors:
            scale = tensors[f"{NAME}.nested_absmax"][block // nested_blocksize]
            absmax = tensors[f"{NAME}.nested_quant_map"][int(absmax)] * scale + torch.tensor(0.0371)
        result[i] = values[i] * absmax
    return result.reshape(shape)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 13), st.sampled_from([2, 8, 64]), st.booleans(),
    st.sampled_from(["bfloat16", "float16", "float32"]), st.sampled_from(["nf4", "fp4"]), st.sampled_from([2, 256]),
)  # fmt: skip
def test_four_bits(rows, columns, blocksize, nested, dtype, kind, nested_blocksize):
    tensors = four_bits((rows, columns), blocksize, dtype, nested, kind, nested_blocksize)
    expected = value_by_value(tensors, (rows, columns), blocksize, nested_blocksize).to(getattr(torch, dtype))
    for fields in (FOUR, None):
        assert same_bits(dequantized(tensors, fields)[NAME], expected)
    source = recognize(tensors, FOUR)
    assert (source.name, source.bits, source.is_native) == (f"bitsandbytes, {kind}", 4, False)
    assert source.unused == (f"{NAME}.quant_state.bitsandbytes__{kind}",)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_four_bits_stored_in_another_dtype(storage):
    tensors = four_bits((8, 16))
    expected = dequantized(tensors, FOUR)[NAME]
    size = torch.empty((), dtype=storage).element_size()
    tensors[NAME] = tensors[NAME].flatten().view(storage).reshape(64 // size, 1)
    assert same_bits(dequantized(tensors, FOUR)[NAME], expected)


def eight_bits(**changes) -> dict:
    tensors = {
        "a.weight": random_bytes((6, 10), dtype=torch.int8), "a.SCB": uniform((6,)),
        "a.weight_format": torch.tensor(0, dtype=torch.uint8), "a.bias": torch.zeros(6),
    }  # fmt: skip
    for name, tensor in changes.items():
        tensors.pop(f"a.{name}")
        if tensor is not None:
            tensors[f"a.{name}"] = tensor
    return tensors


def test_eight_bits_are_as_transformers_computes_them():
    tensors = eight_bits()
    # The line of `dequantize_bnb_weight` that needs no bitsandbytes.
    expected = tensors["a.weight"] * tensors["a.SCB"].view(-1, 1) * 7.874015718698502e-3
    for fields in (EIGHT, None):
        assert same_bits(dequantized(tensors, fields)["a.weight"], expected)
        assert recognize(tensors, fields).unused == ("a.weight_format",)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (eight_bits(SCB=None), r"a\.weight"),
        (eight_bits(weight=None), r"a\.weight"),
        (eight_bits(SCB=uniform((5,))), r"a\.SCB"),
        (eight_bits(weight_format=torch.tensor(2, dtype=torch.uint8)), r"a\.weight_format"),
        (eight_bits(weight_format=torch.tensor([], dtype=torch.uint8)), r"a\.weight_format"),
        (eight_bits(weight=torch.ones(6, 10)), r"a\.weight"),
    ],
)
@pytest.mark.parametrize("fields", [EIGHT, None])
def test_eight_bits_that_contradict_themselves_are_refused(tensors, named, fields):
    with pytest.raises(CheckpointError, match=named):
        recognize(tensors, fields)


def broken_state(**changes) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 10]}
    return state_bytes({key: value for key, value in (state | changes).items() if value is not None})


@pytest.mark.parametrize(
    "state",
    [
        torch.tensor([1, 2, 255], dtype=torch.uint8), state_bytes([1]), broken_state(blocksize=0),
        broken_state(blocksize="64"), broken_state(shape=[6, 11]), broken_state(shape=[]), broken_state(shape=None),
        broken_state(shape=[-6, -10]), broken_state(dtype="int8"), broken_state(dtype=[1]), broken_state(blocksize=8),
        broken_state(nested_blocksize=256), broken_state(nested_blocksize=256, nested_offset="a"),
    ],
)  # fmt: skip
def test_a_quant_state_that_contradicts_the_tensors_is_refused(state):
    tensors = four_bits() | {f"{NAME}.quant_state.bitsandbytes__nf4": state}
    with pytest.raises(CheckpointError, match="up_proj"):
        recognize(tensors, FOUR)


@pytest.mark.parametrize("part", [
    "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"
])  # fmt: skip
@pytest.mark.parametrize("fields", [FOUR, None])
def test_a_missing_part_is_refused_and_named(part, fields):
    tensors = four_bits(nested=True)
    del tensors[NAME + part]
    with pytest.raises(CheckpointError, match="up_proj"):
        recognize(tensors, fields)
