"""FP8 checkpoints, and fp4 packed in bytes: equal to transformers bit for bit, edge blocks as DeepSeek has them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_checkpoints import dequantized, float8, headers_of, random_bytes, recognize, same_bits, uniform
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.source import StoredHeader, source_format

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NAME = "model.layers.0.mlp.up_proj.weight"
OPERATION = Fp8Dequantize(SimpleNamespace(quantization_config=None))


def small_blocks(rows: int, columns: int) -> dict:
    return FP8 | {"weight_block_size": [rows, columns]}


def transformers_dequantize(weight, scale, dtype=torch.float32):
    return OPERATION._dequantize_one(weight, scale, output_dtype=dtype)


def weight_dequant(weight, scale, rows, columns):
    """DeepSeek-V3's inference/kernel.py, value by value."""
    result = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            result[i, j] = weight[i, j].float() * scale[i // rows, j // columns].float()
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fields", [small_blocks(16, 8), None, FP8])
def test_blocks_are_as_transformers_reads_them(fields, dtype):
    tensors = {NAME: float8((48, 32)), NAME + "_scale_inv": uniform((3, 4))}
    result = dequantized(tensors, fields)[NAME]
    assert same_bits(result.to(dtype), transformers_dequantize(*tensors.values(), dtype))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_edge_blocks_are_as_deepseek_reads_them(rows, columns, block_rows, block_columns, scale_dtype):
    scale = uniform((-(-rows // block_rows), -(-columns // block_columns)), dtype=scale_dtype)
    tensors = {NAME: float8((rows, columns)), NAME + "_scale_inv": scale}
    result = dequantized(tensors, small_blocks(block_rows, block_columns))[NAME]
    assert same_bits(result, weight_dequant(tensors[NAME], scale, block_rows, block_columns))


def test_an_edge_block_without_a_config_has_the_size_that_other_weights_have():
    tensors = {}
    for name, rows in (("a.weight", 32), ("b.weight", 64), ("c.weight", 36), ("d.weight", 24)):
        tensors[name] = float8((rows, 32))
        tensors[name + "_scale_inv"] = uniform((-(-rows // 16), 2))
    result = dequantized(tensors, None)
    for name in ("c.weight", "d.weight"):
        assert same_bits(result[name], weight_dequant(tensors[name], tensors[name + "_scale_inv"], 16, 16))


def test_an_edge_block_that_nothing_explains_is_refused():
    tensors = {NAME: float8((36, 32)), NAME + "_scale_inv": uniform((5, 2))}
    with pytest.raises(CheckpointError, match="weight_block_size"):
        recognize(tensors, None)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (24, 1), (24,), (1, 16)])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_a_scale_for_the_tensor_or_for_each_row(scale_shape, suffix):
    tensors = {NAME: float8((24, 16)), NAME + suffix: uniform(scale_shape)}
    scale = tensors[NAME + suffix]
    expected = tensors[NAME].float() * (scale[:, None] if scale.shape == (24,) else scale)
    assert same_bits(dequantized(tensors, None)[NAME], expected)


def test_a_scalar_scale_of_no_dimensions_is_as_transformers_reads_it():
    tensors = {NAME: float8((24, 16)), NAME + "_scale_inv": uniform(())}
    result = dequantized(tensors, FP8 | {"weight_block_size": None})[NAME]
    assert same_bits(result.bfloat16(), transformers_dequantize(*tensors.values(), torch.bfloat16))


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_every_spelling_of_the_scales(name):
    tensors = {"a.weight": float8((32, 32)), f"a.{name}": uniform((2, 2))}
    assert list(dequantized(tensors, FP8)) == ["a.weight"]


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_exponents_as_scales(as_bytes, name):
    exponents = random_bytes((16, 2), low=0, high=255)
    scale = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    tensors = {"a.weight": float8((16, 64)), f"a.{name}": scale}
    for dtype in (torch.bfloat16, torch.float32):
        expected = transformers_dequantize(*tensors.values(), dtype)
        assert same_bits(dequantized(tensors, {"quant_method": "mxfp8"})["a.weight"].to(dtype), expected)
        assert same_bits(dequantized(tensors, None)["a.weight"].to(dtype), expected)


@pytest.mark.parametrize("gate_rows", [32, 20])
def test_fused_experts(gate_rows):
    """Each half of gate_up_proj has blocks of its own: 20 rows are 16 + 4 in both."""
    halves = [float8((3, gate_rows, 32), seed) for seed in range(2)]
    scales = [uniform((3, 2, 2), seed) for seed in range(2)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.cat(halves, 1), name + "_scale_inv": torch.cat(scales, 1)}
    result = dequantized(tensors, small_blocks(16, 16))[name]
    for expert in range(3):
        for half in range(2):
            expected = weight_dequant(halves[half][expert], scales[half][expert], 16, 16)
            assert same_bits(result[expert, half * gate_rows :][:gate_rows], expected)
    if gate_rows == 32:
        assert same_bits(result, transformers_dequantize(*tensors.values()))


@pytest.mark.parametrize("scale_shape", [(3,), (3, 1), (3, 1, 1), (3, 8), (3, 8, 1)])
def test_scales_of_fused_experts_that_have_no_blocks(scale_shape):
    tensors = {"experts.down_proj": float8((3, 8, 5)), "experts.down_proj_scale": uniform(scale_shape)}
    scale = tensors["experts.down_proj_scale"].reshape(3, -1, 1)
    assert same_bits(dequantized(tensors, None)["experts.down_proj"], tensors["experts.down_proj"].float() * scale)


def test_fbgemms_experts_have_scales_for_output_channels():
    tensors = {
        "experts.gate_up_proj": float8((2, 6, 10)), "experts.gate_up_proj_scale": uniform((2, 1, 10)),
        "experts.down_proj": float8((2, 6, 6)), "experts.down_proj_scale": uniform((2, 6, 1)),
        "q_proj.weight": float8((6, 4)), "q_proj.weight_scale": uniform((6, 1)), "q_proj.input_scale_ub": uniform((1,)),
    }  # fmt: skip
    result = dequantized(tensors, {"quant_method": "fbgemm_fp8"})
    down = tensors["experts.down_proj"].float() * tensors["experts.down_proj_scale"].transpose(1, 2)
    assert same_bits(result["experts.down_proj"], down)
    up = tensors["experts.gate_up_proj"].float() * tensors["experts.gate_up_proj_scale"]
    assert same_bits(result["experts.gate_up_proj"], up)
    assert recognize(tensors, {"quant_method": "fbgemm_fp8"}).unused == ("q_proj.input_scale_ub",)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float4_e2m1fn_x2])
@pytest.mark.parametrize("exponents", [True, False])
def test_packed_fp4_experts(dtype, exponents):
    scale = random_bytes((6, 4)).view(torch.float8_e8m0fnu) if exponents else uniform((6, 4))
    if exponents:
        scale = random_bytes((6, 4), high=255).view(torch.float8_e8m0fnu)
    tensors = {"experts.0.w1.weight": random_bytes((6, 64), dtype=dtype), "experts.0.w1.scale": scale}
    source = recognize(tensors, FP8)
    assert source.bits == 4
    assert source.weights[0].shape == (6, 128)
    for target in (torch.bfloat16, torch.float32):
        expected = transformers_dequantize(*tensors.values(), target)
        assert same_bits(dequantized(tensors, FP8)["experts.0.w1.weight"].to(target), expected)


def test_modelopt_stores_scales_of_activations_and_of_the_cache_that_full_precision_does_not_need():
    tensors = {
        "k_proj.weight": float8((8, 8)), "k_proj.weight_scale": uniform(()), "k_proj.input_scale": uniform(()),
        "k_proj.k_scale": uniform(()), "v_proj.v_scale": uniform(()), "norm.weight": uniform((8,)),
    }  # fmt: skip
    for fields in ({"quant_method": "modelopt", "quant_algo": "FP8"}, None):
        source = recognize(tensors, fields)
        assert set(source.unused) == {"k_proj.input_scale", "k_proj.k_scale", "v_proj.v_scale"}
        assert [weight.name for weight in source.weights] == ["k_proj.weight"]
        assert (source.bits, source.is_native) == (8, False)


def test_modelopts_blocks_have_four_dimensions():
    tensors = {"a.weight": float8((32, 48)), "a.weight_scale": uniform((2, 1, 3, 1))}
    result = dequantized(tensors, {"quant_method": "modelopt"})["a.weight"]
    assert same_bits(result, weight_dequant(tensors["a.weight"], tensors["a.weight_scale"][:, 0, :, 0], 16, 16))


def test_the_name_says_the_blocks():
    tensors = {NAME: float8((256, 128)), NAME + "_scale_inv": uniform((2, 1))}
    assert recognize(tensors, FP8).name == "fp8 (blocks of 128 × 128)"


def broken(**changes) -> dict:
    tensors = {
        "a.weight": float8((32, 32)), "a.weight_scale_inv": uniform((2, 2)),
        "b.weight": float8((32, 32)), "b.weight_scale_inv": uniform((2, 2)),
    }  # fmt: skip
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (broken(b__weight_scale_inv=None), r"b\.weight "),
        (broken(b__weight=None), r"b\.weight_scale_inv"),
        (broken(b__weight=torch.ones(32, 32)), r"b\.weight_scale_inv"),
        (broken(b__weight_scale=uniform(())), r"b\.weight_scale_inv and b\.weight_scale"),
        (broken(b__weight_scale_inv=uniform((3, 7))), r"scales of b\.weight"),
        (broken(b__weight_scale_inv=uniform((2, 2, 2))), r"scales of b\.weight"),
        (broken(b__weight_scale_inv=uniform((0, 2))), r"b\.weight_scale_inv"),
        (broken(b__weight=float8((0, 32))), r"b\.weight"),
        (broken(b__weight_scale_inv=torch.ones(2, 2, dtype=torch.int64)), r"b\.weight_scale_inv"),
        (broken(b__other=float8((2, 2))), r"b\.other"),
        (broken(c__weight=torch.ones(4, 4, dtype=torch.uint8)), r"c\.weight"),
        (broken(c__pre_quant_scale=uniform((32,))), "pre_quant_scale"),
    ],
)
@pytest.mark.parametrize("fields", [None, small_blocks(16, 16)])
def test_what_contradicts_itself_is_refused_and_named(tensors, named, fields):
    with pytest.raises(CheckpointError, match=named):
        recognize(tensors, fields)


def test_float8_without_any_scales_is_refused():
    for fields in (None, FP8):
        with pytest.raises(CheckpointError, match="no tensor beside it holds its scales"):
            recognize({"a.weight": float8((4, 4)), "b.weight": float8((4, 4))}, fields)


def test_weights_without_scales_are_counted():
    tensors = {"a.weight": float8((4, 4)), "a.weight_scale": uniform((1,))}
    tensors |= {f"{name}.weight": float8((4, 4)) for name in "bcd"}
    words = r"b\.weight is F8_E4M3 and has no scales \(nor have 2 others\), but a\.weight has a\.weight_scale"
    with pytest.raises(CheckpointError, match=words):
        recognize(tensors, FP8)


@pytest.mark.parametrize("block", [0, [128], [0, 128], ["a", 1], [True, 1], {"rows": 1}, [-1, 4]])
def test_a_block_size_that_is_none_is_refused(block):
    with pytest.raises(CheckpointError, match="weight_block_size"):
        recognize(broken(), FP8 | {"weight_block_size": block})


@pytest.mark.parametrize("rows", [2**62, 2**63, 2**64 - 1, 2**80])
def test_a_block_larger_than_the_weight_is_the_whole_weight(rows):
    tensors = {"a.weight": float8((4, 4)), "a.weight_scale_inv": uniform((1, 1))}
    expected = dequantized(tensors, FP8 | {"weight_block_size": [4, 4]})
    assert same_bits(dequantized(tensors, FP8 | {"weight_block_size": [rows, 4]})["a.weight"], expected["a.weight"])


def test_a_config_without_quantized_weights_is_refused():
    with pytest.raises(CheckpointError, match="no tensor is quantized so"):
        recognize({"a.weight": torch.ones(4, 4)}, FP8)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from(["F8_E4M3", "I8", "U8", "F4", "F32", "F6", ""]),
    st.sampled_from(["F32", "F8_E8M0", "U8", "I64", "F8_E4M3"]),
    st.sampled_from([None, FP8, {"quant_method": "modelopt"}, {"quant_method": "fbgemm_fp8"}]),
    st.sampled_from(["a.weight_scale_inv", "a.weight_scale", "a.scale", "a.weight_scale_2"]),
)
def test_any_headers_are_read_or_refused(shape, scale_shape, dtype, scale_dtype, fields, scale):
    headers = {"a.weight": StoredHeader(dtype, tuple(shape)), scale: StoredHeader(scale_dtype, tuple(scale_shape))}
    with contextlib.suppress(CheckpointError):
        source_format(headers, fields, lambda name: torch.zeros(()))


def test_headers_with_impossible_sizes_are_refused():
    headers = headers_of(broken())
    headers["b.weight"] = StoredHeader("F8_E4M3", (-1, 32))
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        source_format(headers, FP8, lambda name: torch.zeros(()))


@pytest.mark.parametrize("fields", [None, {"quant_method": "modelopt"}, {"quant_method": "fbgemm_fp8"}])
def test_int8_is_two_fp4_in_transformers_fp8_alone(fields):
    tensors = {"a.weight": random_bytes((4, 32), dtype=torch.int8), "a.weight_scale": uniform((4, 2))}
    assert recognize(tensors, {"quant_method": "fp8"}).weights[0].shape == (4, 64)
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        recognize(tensors, fields)
