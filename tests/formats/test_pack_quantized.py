"""Streams of bits: a loop over bits says what they are, and compressed-tensors reads what is packed here."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from references.compressed_tensors_reader import decompress
from torch import Tensor

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.awq import pack_weight as pack_awq
from hf_awq_offload.formats.awq import unpack_weight as unpack_awq
from hf_awq_offload.formats.conversion import to_awq, to_pack_quantized
from hf_awq_offload.formats.grid import Grid, GroupParameters, dequantize, group_parameters, group_range, quantize
from hf_awq_offload.formats.pack_quantized import (
    dequantize_rows,
    pack_stream,
    pack_weight,
    unpack_stream,
    unpack_zeros,
    words_for,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
ZERO_POINT = pytest.mark.parametrize("zero_point", [True, False], ids=["asymmetric", "symmetric"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


def stream_by_bits(codes: list[int], bits: int) -> list[int]:
    """One row as unsigned words: all bits in one line, cut every 32."""
    line = sum(code << (bits * i) for i, code in enumerate(codes))
    return [(line >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]


def grid_of(bits: int, group_size: int, zero_point: bool, dtype: torch.dtype) -> Grid:
    return Grid(bits, group_size, zero_point, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


def random_weight(
    bits: int, zero_point: bool, dtype: torch.dtype, out_features: int = 40, in_features: int = 96, group_size: int = 32
) -> tuple[Tensor, GroupParameters, Grid]:
    """Codes, parameters and grid of a random weight."""
    grid = grid_of(bits, group_size, zero_point, dtype)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(bits)) * 0.05
    parameters = group_parameters(group_range(weight, grid), grid)
    return quantize(weight, parameters, grid), parameters, grid


@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_bits_are_where_the_format_says(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    words = pack_stream(codes, bits)
    assert words.shape == (rows, words_for(columns, bits))
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    unsigned = (words.long() & 0xFFFFFFFF).tolist()
    assert unsigned == [stream_by_bits(row, bits) for row in codes.tolist()]


@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_unpacking_is_the_inverse(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    again = unpack_stream(pack_stream(codes, bits), columns, bits)
    assert again.dtype == torch.uint8
    assert torch.equal(again.long(), codes)


@given(bits=st.integers(1, 8), rows=st.integers(1, 70), columns=st.integers(1, 70), along=st.integers(0, 1))
def test_compressed_tensors_packs_and_unpacks_the_same(bits, rows, columns, along):
    codes = random_codes(rows, columns, bits)
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits, packed_dim=along)
    ours = pack_stream(codes, bits) if along else pack_stream(codes.t(), bits).t()
    assert torch.equal(ours, theirs)
    assert torch.equal(unpack_from_int32(ours, bits, codes.shape, packed_dim=along), signed)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64], ids=str)
def test_codes_of_any_dtype(bits, dtype):
    codes = random_codes(3, 37, bits)
    assert torch.equal(pack_stream(codes.to(dtype), bits), pack_stream(codes, bits))


@BITS
def test_rows_that_are_not_contiguous(bits):
    codes = random_codes(37, 3, bits)
    assert torch.equal(pack_stream(codes.t(), bits), pack_stream(codes.t().contiguous(), bits))
    words = pack_stream(codes.t(), bits).t().contiguous().t()
    assert torch.equal(unpack_stream(words, 37, bits).long(), codes.t())


@BITS
@ZERO_POINT
@DTYPES
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [(40, 96, 32), (40, 96, 96), (33, 64, 32), (1, 32, 32), (7, 256, 128), (64, 128, 128)],
    ids=str,
)
class TestWeights:
    def test_compressed_tensors_dequantizes_to_the_same_weight(
        self, bits, zero_point, dtype, out_features, in_features, group_size
    ):
        codes, parameters, grid = random_weight(bits, zero_point, dtype, out_features, in_features, group_size)
        packed = pack_weight(codes, parameters, grid, dtype)
        expected = dequantize(codes, parameters, grid).to(dtype)
        theirs = decompress(packed, grid)
        assert theirs.dtype == dtype
        assert torch.equal(theirs, expected)
        zeros = unpack_zeros(packed.weight_zero_point, out_features, bits)
        ours = dequantize_rows(packed.weight_packed, packed.weight_scale, zeros, in_features, bits, dtype)
        assert torch.equal(ours, expected)

    def test_the_tensors_are_those_of_the_format(self, bits, zero_point, dtype, out_features, in_features, group_size):
        codes, parameters, grid = random_weight(bits, zero_point, dtype, out_features, in_features, group_size)
        packed = pack_weight(codes, parameters, grid, dtype)
        n = in_features // group_size
        assert packed.weight_packed.shape == (out_features, -(-in_features * bits // 32))
        assert packed.weight_scale.shape == (out_features, n)
        assert packed.weight_scale.dtype == dtype
        assert packed.weight_shape.tolist() == [out_features, in_features]
        if zero_point:
            assert packed.weight_zero_point.shape == (-(-out_features * bits // 32), n)
        else:
            assert packed.weight_zero_point is None
        assert all(tensor.is_contiguous() for tensor in packed if tensor is not None)


@DTYPES
@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e9])
@BITS
@ZERO_POINT
def test_scales_are_exact_in_fp16_and_in_the_dtype_that_stores_them(bits, zero_point, magnitude, dtype):
    grid = grid_of(bits, 32, zero_point, dtype)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * magnitude
    scale = group_parameters(group_range(weight, grid), grid).scale
    assert bool((scale > 0).all())
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert torch.equal(scale.to(dtype).float(), scale)


class TestConversion:
    @ZERO_POINT
    @DTYPES
    @pytest.mark.parametrize("group_size", [32, 96])
    def test_from_awq_and_back_to_the_bit(self, zero_point, dtype, group_size):
        codes, parameters, _ = random_weight(4, zero_point, dtype, group_size=group_size)
        awq = pack_awq(codes, parameters)
        converted = to_pack_quantized(awq, zero_point, dtype)
        grid = grid_of(4, group_size, zero_point, dtype)
        assert (converted.weight_zero_point is not None) is zero_point
        assert converted.weight_scale.dtype == dtype
        assert torch.equal(decompress(converted, grid).float(), unpack_awq(awq, dtype).float())
        for tensor, original in zip(to_awq(converted), awq, strict=True):
            assert torch.equal(tensor, original)
            assert tensor.dtype == original.dtype
            assert tensor.is_contiguous()

    @ZERO_POINT
    @DTYPES
    def test_from_pack_quantized_and_back_to_the_bit(self, zero_point, dtype):
        codes, parameters, grid = random_weight(4, zero_point, dtype)
        packed = pack_weight(codes, parameters, grid, dtype)
        again = to_pack_quantized(to_awq(packed), zero_point, dtype)
        for tensor, original in zip(again, packed, strict=True):
            assert (tensor is None) == (original is None)
            assert tensor is None or (torch.equal(tensor, original) and tensor.dtype == original.dtype)

    def test_zero_points_are_eight_less_in_the_library(self):
        codes, parameters, _ = random_weight(4, True, torch.float16)
        converted = to_pack_quantized(pack_awq(codes, parameters), True, torch.float16)
        theirs = unpack_from_int32(converted.weight_zero_point, 4, parameters.zero.shape, packed_dim=0)
        assert torch.equal(theirs.float(), parameters.zero - 8)

    def test_scales_that_would_change_are_refused(self):
        codes, parameters, _ = random_weight(4, True, torch.float16)
        with pytest.raises(CheckpointError, match="not exact in bfloat16"):
            to_pack_quantized(pack_awq(codes, parameters), True, torch.bfloat16)
        packed = to_pack_quantized(pack_awq(codes, parameters), True, torch.float32)
        with pytest.raises(CheckpointError, match="not exact in float16"):
            to_awq(packed._replace(weight_scale=packed.weight_scale * (1 + 2**-12)))

    def test_zero_points_of_a_grid_without_them_are_refused(self):
        codes, parameters, _ = random_weight(4, True, torch.float16)
        with pytest.raises(CheckpointError, match="zero_point=false"):
            to_pack_quantized(pack_awq(codes, parameters), False, torch.float16)

    def test_a_shape_that_awq_does_not_hold_is_refused(self):
        codes, parameters, grid = random_weight(4, True, torch.float16, out_features=12)
        with pytest.raises(
            CheckpointError,
            match=r"12 output channels; .* multiples of 8\. Leave it in compressed-tensors, or in full precision",
        ):
            to_awq(pack_weight(codes, parameters, grid, torch.float16))
