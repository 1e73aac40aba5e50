"""compressed-tensors checkpoints: equal to the library's own decompression bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import dequantized, float8, random_bytes, recognize, same_bits, uniform

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.pack_quantized import pack_stream

NAME = "model.layers.0.mlp.up_proj"


def config(*groups: dict, **fields) -> dict:
    """Each group: its format, and the arguments of its weights."""
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": group.pop("targets", ["Linear"]),
                "format": group.pop("format"),
                "weights": group,
            }
            for i, group in enumerate(dict(group) for group in groups)
        },
        "ignore": ["lm_head"],
    } | fields


def scheme_of(group: dict) -> QuantizationScheme:
    arguments = {key: value for key, value in group.items() if key not in ("format", "targets")}
    return QuantizationScheme(targets=["Linear"], format=group["format"], weights=QuantizationArgs(**arguments))


def decompressed(group: dict, tensors: dict) -> torch.Tensor:
    local = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    return BaseCompressor.get_value_from_registry(group["format"]).decompress(local, scheme_of(group))["weight"]


def check(group: dict, tensors: dict, fields: dict | None = None) -> None:
    """The module named NAME is as the library decompresses it, in every dtype that a model may have."""
    result = dequantized(tensors, fields or config(group))[f"{NAME}.weight"]
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(NAME + ".")}
    expected = decompressed(group, own)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert same_bits(result.to(dtype), expected.to(dtype))


def packed(group: dict, out: int, in_features: int, scale_dtype=torch.bfloat16, seed=0) -> dict:
    """A linear as the library itself packs it."""
    bits, size = group["num_bits"], group.get("group_size") or in_features
    n = in_features // size if group["strategy"] == "group" else 1
    generator = torch.Generator().manual_seed(seed)
    state = {
        "weight": torch.randn(out, in_features, generator=generator) * 0.05,
        "weight_scale": uniform((out, n), seed, scale_dtype),
    }
    if not group.get("symmetric", True):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        state["weight_zero_point"] = torch.randint(low, high, (out, n), generator=generator, dtype=torch.int8)
    compressed = BaseCompressor.get_value_from_registry(group["format"]).compress(state, scheme_of(group))
    return {f"{NAME}.{name}": tensor for name, tensor in compressed.items()}


def integers(bits: int, symmetric: bool, group_size: int | None) -> dict:
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"format": "pack-quantized", "num_bits": bits, "type": "int", "symmetric": symmetric} | strategy


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 8), st.booleans(), st.sampled_from([None, 8, 32]), st.integers(9, 37), st.integers(1, 5),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
def test_packed_integers(bits, symmetric, group_size, out, groups, scale_dtype):
    group = integers(bits, symmetric, group_size)
    in_features = 32 * groups
    tensors = packed(group, out, in_features, scale_dtype)
    check(group, tensors)
    source = recognize(tensors, config(group))
    assert (source.bits, source.is_native, source.unused) == (bits, False, (f"{NAME}.weight_shape",))


def test_a_channel_of_any_width():
    for in_features in (1, 7, 33, 45):
        group = integers(3, False, None)
        check(group, packed(group, 12, in_features))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_in_one_word(bits):
    """The library can't unpack fewer output channels than fill a word."""
    group = integers(bits, False, 8)
    tensors = packed(group, 40, 32)
    few = 32 // bits
    small = tensors | {f"{NAME}.weight_shape": torch.tensor([few, 32])}
    for name, rows in (("weight_packed", few), ("weight_scale", few), ("weight_zero_point", 1)):
        small[f"{NAME}.{name}"] = tensors[f"{NAME}.{name}"][:rows].clone()
    result = dequantized(small, config(group))[f"{NAME}.weight"]
    assert same_bits(result, decompressed(group, tensors)[:few].contiguous())


@pytest.mark.parametrize("zero", [True, False])
def test_a_stack_of_experts(zero):
    group = integers(4, not zero, 16)
    one, two = packed(group, 16, 32, seed=1), packed(group, 16, 32, seed=2)
    tensors = {name: torch.stack([tensor, two[name]]) for name, tensor in one.items()}
    tensors[f"{NAME}.weight_shape"] = torch.tensor([2, 16, 32])
    result = dequantized(tensors, config(group))[f"{NAME}.weight"]
    assert same_bits(result, torch.stack([decompressed(group, one), decompressed(group, two)]))


def test_an_order_of_input_channels():
    """weight_g_idx, from releases before 0.18: channel i has the scale and zero point of group g_idx[i]."""
    group = integers(4, False, 8)
    tensors = packed(group, 16, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(32) // 8
    codes = torch.randint(0, 16, (16, 32), generator=torch.Generator().manual_seed(1))
    shuffled = tensors | {
        f"{NAME}.weight_packed": pack_stream(codes[:, order], 4),
        f"{NAME}.weight_g_idx": groups[order].to(torch.int32),
    }
    in_order = decompressed(group, tensors | {f"{NAME}.weight_packed": pack_stream(codes, 4)})
    assert same_bits(dequantized(shuffled, config(group))[f"{NAME}.weight"], in_order[:, order].contiguous())
    unordered = shuffled | {f"{NAME}.weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}
    assert same_bits(
        dequantized(unordered, config(group))[f"{NAME}.weight"],
        decompressed(group, tensors | {f"{NAME}.weight_packed": pack_stream(codes[:, order], 4)}),
    )


@pytest.mark.parametrize("g_idx", [torch.full((32,), 4), torch.zeros(32), torch.full((32,), -2)])
def test_an_order_that_names_no_group_is_refused(g_idx):
    tensors = packed(integers(4, True, 8), 6, 32) | {f"{NAME}.weight_g_idx": g_idx.to(torch.int32)}
    with pytest.raises(CheckpointError, match="weight_g_idx"):
        dequantized(tensors, config(integers(4, True, 8)))


BYTES = {"format": "int-quantized", "num_bits": 8, "type": "int"}
FLOATS = {"format": "float-quantized", "num_bits": 8, "type": "float"}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["int-quantized", "float-quantized", "naive-quantized"])
@pytest.mark.parametrize(
    ("strategy", "scale_shape"),
    [
        ({"strategy": "tensor"}, (1,)),
        ({"strategy": "channel"}, (24, 1)),
        ({"strategy": "group", "group_size": 8}, (24, 5)),
        ({"strategy": "block", "block_structure": [16, 16]}, (2, 3)),
        ({"strategy": "block", "block_structure": "16x16"}, (2, 3)),
    ],
)
def test_one_byte_for_a_weight(layout, strategy, scale_shape, scale_dtype):
    kind = "float" if layout == "float-quantized" else "int"
    group = {"format": layout, "num_bits": 8, "type": kind} | strategy
    weight = float8((24, 40)) if kind == "float" else random_bytes((24, 40), dtype=torch.int8)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": uniform(scale_shape, dtype=scale_dtype)}
    check(group, tensors)
    assert recognize(tensors, config(group)).bits == 8


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_int8_with_zero_points(scale_dtype):
    group = BYTES | {"strategy": "group", "group_size": 8, "symmetric": False}
    tensors = {
        f"{NAME}.weight": random_bytes((6, 16), dtype=torch.int8),
        f"{NAME}.weight_scale": uniform((6, 2), dtype=scale_dtype),
        f"{NAME}.weight_zero_point": random_bytes((6, 2), 4, torch.int8),
    }
    check(group, tensors)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8(dtype):
    group = {"format": "mxfp8-quantized", "num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
    exponents = random_bytes((8, 3), low=0, high=255)
    tensors = {f"{NAME}.weight": float8((8, 96)), f"{NAME}.weight_scale": exponents.view(dtype)}
    expected = decompressed(group | {"scale_dtype": torch.uint8}, tensors | {f"{NAME}.weight_scale": exponents})
    result = dequantized(tensors, config(group))[f"{NAME}.weight"]
    assert same_bits(result, expected.to(torch.bfloat16))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([(1,), ()]))
def test_nvfp4(rows, groups, global_shape):
    group = {
        "format": "nvfp4-pack-quantized", "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16
    }  # fmt: skip
    tensors = {
        f"{NAME}.weight_packed": random_bytes((rows, 8 * groups)),
        f"{NAME}.weight_scale": float8((rows, groups)),
        f"{NAME}.weight_global_scale": uniform(global_shape) * 3e4,
        f"{NAME}.input_global_scale": uniform((1,)),
    }
    check(group, tensors)
    source = recognize(tensors, config(group))
    assert (source.name, source.bits, source.unused) == ("nvfp4", 4, (f"{NAME}.input_global_scale",))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4))
def test_mxfp4(rows, groups):
    group = {"format": "mxfp4-pack-quantized", "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    tensors = {
        f"{NAME}.weight_packed": random_bytes((rows, 16 * groups)),
        f"{NAME}.weight_scale": random_bytes((rows, groups), high=250),
    }
    check(group, tensors)
    assert not recognize(tensors, config(group)).is_native


def test_groups_of_different_bits_and_kinds():
    four, eight = integers(4, True, 32), integers(8, False, None) | {"targets": ["re:.*down_proj$"]}
    floats = FLOATS | {"strategy": "channel", "targets": ["re:.*self_attn.*"]}
    tensors = packed(four, 8, 64) | {
        name.replace("up_proj", "down_proj"): tensor for name, tensor in packed(eight, 8, 64).items()
    }
    tensors |= {"a.self_attn.q_proj.weight": float8((8, 8)), "a.self_attn.q_proj.weight_scale": uniform((8, 1))}
    tensors |= {"lm_head.weight": torch.ones(4, 4), "a.self_attn.k_scale": uniform((2, 1, 1))}
    fields = config(four, eight, floats, kv_cache_scheme={"strategy": "attn_head", "num_bits": 8})
    check(four, tensors, fields)
    source = recognize(tensors, fields)
    assert source.bits == 4
    assert {weight.name for weight in source.weights} == {
        f"{NAME}.weight", f"{NAME.replace('up_proj', 'down_proj')}.weight", "a.self_attn.q_proj.weight"
    }  # fmt: skip
    assert "a.self_attn.k_scale" in source.unused
    down = {name: tensor for name, tensor in tensors.items() if "down_proj" in name}
    assert same_bits(
        dequantized(tensors, fields)[f"{NAME.replace('up_proj', 'down_proj')}.weight"], decompressed(eight, down)
    )


def changed(**changes) -> dict:
    tensors = packed(integers(4, False, 8), 8, 64)
    for name, tensor in changes.items():
        tensors.pop(f"{NAME}.{name}", None)
        if tensor is not None:
            tensors[f"{NAME}.{name}"] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (changed(weight_scale=None), "weight_scale"),
        (changed(weight_zero_point=None), "weight_zero_point"),
        (changed(weight_shape=None), "weight_shape"),
        (changed(weight_packed=None), "up_proj"),
        (changed(weight=torch.ones(8, 64)), r"up_proj\.weight"),
        (changed(weight_shape=torch.tensor([8, 48])), "weight_packed"),
        (changed(weight_shape=torch.tensor([9, 64])), "weight_shape"),
        (changed(weight_shape=torch.tensor([8, 64, 1])), "weight_shape"),
        (changed(weight_shape=torch.tensor([8, 0])), "weight_shape"),
        (changed(weight_scale=uniform((8, 7))), "weight_scale"),
        (changed(weight_scale=uniform((7, 8))), "weight_scale"),
        (changed(weight_zero_point=torch.ones(8, 8, dtype=torch.int32)), "weight_zero_point"),
        (changed(weight_g_idx=torch.zeros(63, dtype=torch.int32)), "weight_g_idx"),
        (changed(weight_packed=random_bytes((8, 32))), "up_proj"),
    ],
)
def test_what_contradicts_itself_is_refused_and_named(tensors, named):
    with pytest.raises(CheckpointError, match=named):
        recognize(tensors, config(integers(4, False, 8)))


def test_bits_that_the_config_does_not_say_are_refused():
    with pytest.raises(CheckpointError, match="bits"):
        recognize(packed(integers(4, True, 8), 8, 64), config(integers(8, True, 8)))


def test_names_decide_where_a_row_is_too_short_to_say_the_bits():
    """One word holds four values of 3 bits and of 8 bits alike."""
    three, eight = integers(3, True, None), integers(8, True, None)
    tensors = packed(three, 8, 4)
    named = config(three | {"targets": [f"re:.*{NAME}$"]}, eight | {"targets": ["Linear"]})
    check(three, tensors, named)
    with pytest.raises(CheckpointError, match="bits"):
        recognize(tensors, config(three, eight))
    with pytest.raises(CheckpointError, match="no pattern"):
        recognize(tensors, config(three | {"targets": ["re:("]}, eight))


def test_zero_points_that_the_config_rules_out_are_refused():
    with pytest.raises(CheckpointError, match="symmetric"):
        recognize(packed(integers(4, False, 8), 8, 64), config(integers(4, True, 8)))


def test_mxfp6_is_refused_by_name():
    tensors = {f"{NAME}.weight_packed": random_bytes((4, 48)), f"{NAME}.weight_scale": random_bytes((4, 2))}
    with pytest.raises(CheckpointError, match="mxfp6"):
        recognize(tensors, config(integers(4, True, 8)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (config(integers(4, True, 8) | {"format": "marlin-24"}), "marlin-24"),
        (config(integers(4, True, 8), sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (config(integers(4, True, 8), transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        ({"quant_method": "compressed-tensors", "config_groups": ["a"]}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "config_groups"),
        ({"config_groups": {"a": {"weights": {"num_bits": "4"}}}}, "num_bits"),
        ({"config_groups": {"a": {"weights": {"block_structure": "ax1"}}}}, "block_structure"),
        ({"config_groups": {"a": {"weights": {"group_size": "8"}}}}, "group_size"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "targets": [1]}}}, "targets"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}, "targets": "Linear"}}}, "targets"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}}}, "format": ["a"]}, "format"),
    ],
)
def test_configs_that_can_not_be_read_are_refused(fields, named):
    with pytest.raises(CheckpointError, match=named):
        recognize(changed(), fields)
