"""The AWQ GEMM layout against its specification, bit by bit, and against what other tools wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hf_awq_offload.formats.awq import PackedWeight, pack_columns, pack_weight, unpack_columns, unpack_weight
from hf_awq_offload.formats.grid import Grid, GroupParameters, dequantize, group_parameters, group_range, quantize

COLUMN_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The format's: bits 4i … 4i+3 of word c hold output column 8c + COLUMN_ORDER[i]."""

INTEROP = load_file(Path(__file__).parents[1] / "data" / "interop" / "linears.safetensors")


def nibble(word: int, position: int) -> int:
    """Bits 4·position … 4·position+3 of a 32-bit word."""
    return ((word & 0xFFFFFFFF) >> (4 * position)) & 0xF


def random_codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed))


codes_of_any_shape = st.builds(
    random_codes, st.integers(1, 9), st.integers(1, 9).map(lambda words: 8 * words), st.integers(0, 2**32 - 1)
)


@given(codes=codes_of_any_shape)
def test_unpacking_is_the_inverse_of_packing(codes):
    words = pack_columns(codes)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], codes.shape[1] // 8)
    assert torch.equal(unpack_columns(words).long(), codes)


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_packing_is_the_inverse_of_unpacking(words):
    words = torch.tensor([words], dtype=torch.int32)
    columns = unpack_columns(words)
    assert columns.dtype == torch.uint8
    assert columns.shape == (1, 8 * words.shape[1])
    assert torch.equal(pack_columns(columns), words)


@given(codes=codes_of_any_shape)
def test_every_four_bits_hold_the_column_that_the_format_says(codes):
    words = pack_columns(codes)
    for row in range(words.shape[0]):
        for c in range(words.shape[1]):
            for i in range(8):
                assert nibble(words[row, c].item(), i) == codes[row, 8 * c + COLUMN_ORDER[i]]


def test_a_known_word():
    word = pack_columns(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])).item()
    assert word == 0x75316420
    assert pack_columns(torch.tensor([[8, 9, 10, 11, 12, 13, 14, 15]])).item() == 0xFDB9ECA8 - 2**32


def test_all_ones_is_minus_one():
    assert pack_columns(torch.full((2, 16), 15)).tolist() == [[-1, -1], [-1, -1]]
    assert unpack_columns(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[15] * 8]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_may_have_any_dtype(dtype):
    codes = random_codes(3, 16)
    assert torch.equal(pack_columns(codes.to(dtype)), pack_columns(codes))


def quantized(out: int, in_: int, grid: Grid, seed: int = 0) -> tuple[Tensor, GroupParameters]:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))
    parameters = group_parameters(group_range(weight, grid), grid)
    return quantize(weight, parameters, grid), parameters


@given(
    words=st.integers(1, 4),
    n=st.integers(1, 3),
    group_size=st.sampled_from([1, 4, 16, 32]),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_packed_weight_unpacks_to_exactly_the_dequantized_one(words, n, group_size, zero_point, seed):
    grid = Grid(4, group_size, zero_point)
    codes, parameters = quantized(8 * words, n * group_size, grid, seed)
    packed = pack_weight(codes, parameters)
    assert packed.qweight.shape == (n * group_size, words)
    assert packed.qzeros.shape == (n, words)
    assert packed.scales.shape == (n, 8 * words)
    assert (packed.qweight.dtype, packed.qzeros.dtype, packed.scales.dtype) == (torch.int32, torch.int32, torch.float16)
    assert all(tensor.is_contiguous() for tensor in packed)
    assert torch.equal(unpack_weight(packed, torch.float32), dequantize(codes, parameters, grid))


def test_a_weight_is_stored_transposed_with_its_zero_points_as_they_are():
    grid = Grid(4, 16, True)
    codes, parameters = quantized(16, 48, grid)
    packed = pack_weight(codes, parameters)
    for column in range(16):
        c, i = column // 8, COLUMN_ORDER.index(column % 8)
        for channel in range(48):
            assert nibble(packed.qweight[channel, c].item(), i) == codes[column, channel]
        for group in range(3):
            assert nibble(packed.qzeros[group, c].item(), i) == parameters.zero[column, group]
            assert packed.scales[group, column] == parameters.scale[column, group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dequantizing_rounds_once(dtype):
    codes, parameters = quantized(16, 48, Grid(4, 16, True))
    packed = pack_weight(codes, parameters)
    unpacked = unpack_weight(packed, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, unpack_weight(packed, torch.float64).to(dtype))


def test_unpacking_leaves_the_packed_tensors_as_they_were():
    packed = pack_weight(*quantized(16, 48, Grid(4, 16, True)))
    before = PackedWeight(*(tensor.clone() for tensor in packed))
    unpack_weight(packed, torch.float32)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(packed, before, strict=True))


def from_interop(name: str) -> PackedWeight:
    return PackedWeight(*(INTEROP[f"{name}.{part}"] for part in PackedWeight._fields))


def decode_gemv(packed: PackedWeight, group_size: int) -> Tensor:
    """AutoAWQ's GEMV layout, see data/interop/README.md: words run along the input channels, in order. (out, in)"""
    out, words = packed.qweight.shape
    weight = torch.empty(out, 8 * words)
    qweight, qzeros = packed.qweight.tolist(), packed.qzeros.tolist()
    scales = packed.scales.float().tolist()
    for row in range(out):
        for channel in range(8 * words):
            group = channel // group_size
            zero = nibble(qzeros[row][group // 8], group % 8)
            code = nibble(qweight[row][channel // 8], channel % 8)
            weight[row, channel] = (code - zero) * scales[row][group]
    return weight


@pytest.mark.parametrize("linear", ["q_proj", "down_proj"])
def test_gemm_of_autoawq_decodes_to_the_weight_that_its_gemv_holds(linear):
    gemm = unpack_weight(from_interop(f"autoawq-gemm.{linear}"), torch.float32)
    assert torch.equal(gemm, decode_gemv(from_interop(f"autoawq-gemv.{linear}"), group_size=128))


@pytest.mark.parametrize("tool", ["autoawq-gemm", "gptqmodel-gemm"])
def test_gemm_of_other_tools_decodes_to_the_scaled_source_weight(tool):
    """Half a step, and a tenth for what the tool computed in fp16; a wrong column order would be off by whole steps."""
    scale = INTEROP["source.input_layernorm"].float() / INTEROP[f"{tool}.input_layernorm"].float()
    packed = from_interop(f"{tool}.q_proj")
    step = packed.scales.float().t().repeat_interleave(128, dim=1)
    error = unpack_weight(packed, torch.float32) - INTEROP["source.q_proj"].float() * scale
    assert (error / step).abs().max() < 0.6


@pytest.mark.parametrize("tool", ["autoawq-gemm", "gptqmodel-gemm"])
@pytest.mark.parametrize("linear", ["q_proj", "down_proj"])
def test_packing_what_was_unpacked_gives_back_the_bytes_that_other_tools_wrote(tool, linear):
    theirs = from_interop(f"{tool}.{linear}")
    codes = unpack_columns(theirs.qweight).t()
    parameters = GroupParameters(theirs.scales.float().t(), unpack_columns(theirs.qzeros).float().t())
    ours = pack_weight(codes, parameters)
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
