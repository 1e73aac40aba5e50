"""The tables of layouts against what the packing functions make: names, shapes and dtypes."""

from __future__ import annotations

import pytest
import torch

from hf_awq_offload.formats import awq, pack_quantized
from hf_awq_offload.formats.awq_variants import gemv_words, to_gemv
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range, quantize
from hf_awq_offload.formats.layouts import (
    AWQ_FORMATS,
    COMPRESSED_TENSORS,
    SPELLINGS,
    TensorLayout,
    features_of,
    find_tensors,
    names_in,
    tensors_of,
)

IN, OUT = 192, 40


def packed(format: str, grid: Grid) -> dict[str, torch.Tensor]:
    """The tensors of a random linear."""
    weight = torch.randn(OUT, IN)
    parameters = group_parameters(group_range(weight, grid), grid)
    codes = quantize(weight, parameters, grid)
    if format == COMPRESSED_TENSORS:
        made = pack_quantized.pack_weight(codes, parameters, grid, torch.bfloat16)._asdict()
    else:
        gemm = awq.pack_weight(codes, parameters)
        made = (to_gemv(gemm) if format == "gemv" else gemm)._asdict()
    return {name: tensor for name, tensor in made.items() if tensor is not None}


@pytest.mark.parametrize(
    ("format", "bits"), [("gemm", 4), ("gemv", 4), *((COMPRESSED_TENSORS, bits) for bits in (2, 3, 4, 8))]
)
@pytest.mark.parametrize("group_size", [32, 64, 192])
@pytest.mark.parametrize("zero_point", [True, False])
def test_a_packed_linear_has_the_tensors_that_are_stated(format, bits, group_size, zero_point):
    grid = Grid(bits, group_size, zero_point)
    padded_groups = 8 * gemv_words(IN, group_size) if format == "gemv" else None
    stated = tensors_of(format, IN, OUT, grid, torch.bfloat16, padded_groups)
    made = packed(format, grid)
    assert {name: (layout.shape, layout.dtype) for name, layout in stated.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()
    }
    assert list(stated) == list(made)


@pytest.mark.parametrize("format", [*AWQ_FORMATS, COMPRESSED_TENSORS])
def test_names_and_tensors_are_of_the_same_order(format):
    names = names_in(format)
    assert tuple(tensors_of(format, IN, OUT, Grid(4, 64, True))) == names.all
    assert {names.integers, names.scales} < set(names.all)


@pytest.mark.parametrize("format", AWQ_FORMATS)
def test_the_shape_of_the_integers_gives_the_features_back(format):
    qweight = tensors_of(format, IN, OUT, Grid(4, 64, True))["qweight"]
    assert features_of(format, qweight.shape) == (IN, OUT)


def test_the_padded_layouts_as_autoawq_has_them():
    # 192 / 64 = 3 groups: 1 word of zero points, padded to 2 in gemv.
    assert tensors_of("gemv", IN, OUT, Grid(4, 64, True))["qzeros"] == TensorLayout((OUT, 1), torch.int32, 1)
    assert tensors_of("gemv", IN, OUT, Grid(4, 64, True), padded_groups=16) == {
        "qweight": TensorLayout((OUT, 24), torch.int32),
        "qzeros": TensorLayout((OUT, 2), torch.int32, 1),
        "scales": TensorLayout((OUT, 16), torch.float16, 1),
    }
    for format in ("gemv_fast", "llm-awq"):
        assert tensors_of(format, IN, OUT, Grid(4, 64, True)) == {
            "qweight": TensorLayout((10, IN), torch.int16),
            "qzeros": TensorLayout((3, OUT), torch.float16, 0),
            "scales": TensorLayout((3, OUT), torch.float16, 0),
        }


class TestFindTensors:
    @pytest.mark.parametrize("zeros", SPELLINGS["qzeros"])
    def test_either_spelling_is_found(self, zeros):
        available = ["up.scales", f"up.{zeros}", "up.qweight", "down.qweight"]
        assert find_tensors("llm-awq", available, "up.") == {
            "qweight": "up.qweight",
            "qzeros": f"up.{zeros}",
            "scales": "up.scales",
        }

    def test_what_is_missing_is_left_out(self):
        assert find_tensors("gemm", ["qweight"]) == {"qweight": "qweight"}
        assert find_tensors(COMPRESSED_TENSORS, ["qweight"]) == {}
