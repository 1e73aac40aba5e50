"""A sound checkpoint of every format with one tensor changed: refused by name, or read; nothing else is ever raised."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_of_each_format import CHECKPOINTS
from quantized_checkpoints import SPELLED, dequantized, recognize, same_bits

from hf_awq_offload.errors import CheckpointError


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_the_sound_checkpoint_is_read(format):
    fields, tensors = CHECKPOINTS[format]
    result = dequantized(tensors, fields)
    source = recognize(tensors, fields)
    accounted = {part for weight in source.weights for part in weight.parts.values()} | set(source.unused)
    assert accounted == tensors.keys()
    assert len(result) == len(source.weights)


@pytest.mark.parametrize("format", CHECKPOINTS)
@pytest.mark.parametrize("prefix", ["", "model.layers.3.mlp.", "weight.", "scale."])
def test_what_stands_before_the_name_of_a_linear_does_not_matter(format, prefix):
    fields, tensors = CHECKPOINTS[format]
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("a.")}
    renamed = {prefix + name.removeprefix("a."): tensor for name, tensor in own.items()}
    before, after = dequantized(own, fields), dequantized(renamed, fields)
    assert after.keys() == {prefix + name.removeprefix("a.") for name in before}
    for name, weight in before.items():
        assert same_bits(after[prefix + name.removeprefix("a.")], weight)
    unused = {prefix + name.removeprefix("a.") for name in recognize(own, fields).unused}
    assert set(recognize(renamed, fields).unused) == unused


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_one_changed_tensor_is_read_or_refused(data):
    fields, tensors = CHECKPOINTS[data.draw(st.sampled_from(sorted(CHECKPOINTS)))]
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    shape = data.draw(st.one_of(st.just(list(tensor.shape)), st.lists(st.integers(0, 33), max_size=4)))
    dtype = data.draw(st.one_of(st.just(tensor.dtype), st.sampled_from(sorted(SPELLED, key=str))))
    fill = data.draw(st.sampled_from([0, 1, 255]))
    size = torch.empty((), dtype=dtype).element_size()
    new = torch.full((max(1, torch.Size(shape).numel()) * size,), fill, dtype=torch.uint8).view(dtype)
    new = new[: torch.Size(shape).numel()].reshape(shape)
    with contextlib.suppress(CheckpointError):
        dequantized(tensors | {name: new}, fields)


@pytest.mark.parametrize("format", CHECKPOINTS)
def test_a_missing_tensor_is_refused_or_was_never_needed(format):
    fields, tensors = CHECKPOINTS[format]
    optional = {"a.weight_g_idx", "a.g_idx", "a.weight_format", "a.input_scale", "a.weight_zero_point"}
    if format == "pack-quantized":
        optional -= {"a.weight_zero_point"}
    for name in tensors.keys() - optional:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(CheckpointError, match=rf"{name.split('.')[0]}\."):
            recognize(rest, fields)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(sorted(CHECKPOINTS)),
    st.sampled_from([
        "quant_method", "weight_block_size", "config_groups", "bits", "group_size", "version", "format", "desc_act",
        "checkpoint_format", "kv_cache_scheme", "sparsity_config", "transform_config", "backend", "dynamic",
    ]),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.text(max_size=5), st.floats(allow_nan=False)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["a", "weights", "num_bits", "targets", "format"]), inner, max_size=3),
        ),
        max_leaves=6,
    ),
)  # fmt: skip
def test_any_config_is_read_or_refused(format, key, value):
    fields, tensors = CHECKPOINTS[format]
    with contextlib.suppress(CheckpointError):
        dequantized(tensors, fields | {key: value})
