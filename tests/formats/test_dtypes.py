"""What a stored tensor takes on disk is what torch takes for it in memory."""

from __future__ import annotations

import re

import pytest
import torch

from hf_awq_offload.formats.dtypes import DTYPES, PAIRS, shape_in_torch, size_bytes


@pytest.mark.parametrize("spelling", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (2,), (0, 2), (5, 1, 6)])
def test_a_tensor_of_the_shape_and_dtype_has_the_size(spelling, shape):
    tensor = torch.empty(shape_in_torch(spelling, shape), dtype=DTYPES[spelling])
    assert tensor.shape[:-1] == shape[:-1]
    values = torch.Size(shape).numel()
    assert (
        tensor.nbytes == size_bytes(spelling, shape) == (values // 2 if spelling == PAIRS else values * tensor.itemsize)
    )


def test_two_values_share_a_byte():
    assert shape_in_torch(PAIRS, [3, 8]) == (3, 4)
    assert all(type(size) is int for size in shape_in_torch(PAIRS, [3, 8]))
    assert size_bytes(PAIRS, [3, 8]) == 12
    assert size_bytes("U8", []) == 1


@pytest.mark.parametrize("shape", [[], [3], [4, 5]])
def test_pairs_that_fill_no_whole_bytes_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"a tensor of F4 has the shape {shape}")):
        shape_in_torch(PAIRS, shape)
