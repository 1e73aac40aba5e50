"""GEMV nibble by nibble, as AutoAWQ's `WQLinear_GEMV` lays it out."""

from __future__ import annotations

import pytest
import torch

from hf_awq_offload.errors import CheckpointError
from hf_awq_offload.formats.awq import pack_weight
from hf_awq_offload.formats.awq_variants import gemv_words, to_gemm, to_gemv
from hf_awq_offload.formats.grid import GroupParameters


def nibble(word: int, position: int) -> int:
    return (word & 0xFFFFFFFF) >> (4 * position) & 15


@pytest.mark.parametrize(("in_features", "group_size"), [(192, 64), (128, 32), (1152, 128), (160, 160)])
def test_every_code_zero_point_and_scale_is_where_autoawq_reads_it(in_features, group_size):
    generator = torch.Generator().manual_seed(in_features)
    out, n = 16, in_features // group_size
    codes = torch.randint(0, 16, (out, in_features), generator=generator)
    zeros = torch.randint(0, 16, (out, n), generator=generator)
    scales = torch.rand(out, n, generator=generator).half().float()
    gemv = to_gemv(pack_weight(codes, GroupParameters(scales, zeros)))

    words = gemv.qweight.tolist()
    assert [[nibble(row[i // 8], i % 8) for i in range(in_features)] for row in words] == codes.tolist()
    padded = 8 * gemv.qzeros.shape[1]
    read = [[nibble(row[g // 8], g % 8) for g in range(padded)] for row in gemv.qzeros.tolist()]
    assert [row[:n] for row in read] == zeros.tolist()
    assert not any(any(row[n:]) for row in read)
    assert gemv.scales.shape == (out, padded)
    assert torch.equal(gemv.scales[:, :n].float(), scales)
    assert not gemv.scales[:, n:].any()
    assert all(tensor.is_contiguous() for tensor in gemv)
    assert (gemv.qweight.dtype, gemv.qzeros.dtype, gemv.scales.dtype) == (torch.int32, torch.int32, torch.float16)
    for again, before in zip(to_gemm("gemv", gemv, n), pack_weight(codes, GroupParameters(scales, zeros)), strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize(
    ("in_features", "group_size", "words"),
    [
        (4096, 128, 4),  # 32 groups fill 4 words
        (4096, 64, 8),
        (4096, 32, 16),
        (1152, 128, 2),  # 9 groups take 2
        (192, 64, 2),  # 3 groups take 1, and at 64 the kernel reads pairs
        (128, 32, 4),  # 4 groups take 1, and at 32 it reads fours
        (1088, 32, 8),  # 34 groups take 5
        (1152, 1152, 1),
    ],
)
def test_words_of_zero_points_are_padded_to_what_the_kernel_reads(in_features, group_size, words):
    assert gemv_words(in_features, group_size) == words


@pytest.mark.parametrize("group_size", [8, 16, 31, 33, 48, 96, 127])
def test_group_sizes_that_autoawq_has_no_kernel_for_are_refused(group_size):
    with pytest.raises(CheckpointError, match=f"group size is {group_size}; .* supports 32, 64, and 128 or more"):
        gemv_words(12 * group_size, group_size)
