"""The model of the caching allocator: sizes, segments, reuse, limits."""

from __future__ import annotations

import gc

import pytest
import torch
from simulated_gpu import observed

MIB = 2**20


@pytest.fixture(autouse=True)
def empty_device():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_allocated() == 0, "an earlier test keeps tensors"
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def memory(count: int) -> torch.Tensor:
    """Returns `count` bytes of the device."""
    return torch.empty(count, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(
    ("wanted", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (21 * MIB + 1, 22 * MIB, 22 * MIB),  # the rest is too small to be split off
    ],
)
def test_a_request_takes_a_segment_of_the_documented_size(wanted, allocated, reserved):
    tensor = memory(wanted)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (allocated, reserved)
    del tensor
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (0, reserved)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0
    assert (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) == (allocated, reserved)


def test_small_blocks_share_a_segment_and_join_again():
    tensors = [memory(MIB // 2) for _ in range(4)]
    assert torch.cuda.memory_reserved() == 2 * MIB
    del tensors
    tensor = memory(MIB)
    assert torch.cuda.memory_reserved() == 2 * MIB
    del tensor


def test_the_smallest_block_that_fits_is_taken():
    large, small = memory(40 * MIB), memory(12 * MIB)
    freed = small.data_ptr()
    del large, small
    tensor = memory(11 * MIB)
    assert torch.cuda.memory_allocated() == 12 * MIB, "the remainder of 1 MiB is not split off"
    assert torch.cuda.memory_reserved() == 52 * MIB
    assert freed
    del tensor


def test_a_block_in_use_keeps_its_segment():
    first, second = memory(4 * MIB), memory(4 * MIB)
    del first
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 20 * MIB
    del second


def test_streams_have_pools_of_their_own():
    first = memory(12 * MIB)
    del first
    with torch.cuda.stream(torch.cuda.Stream()):
        second = memory(12 * MIB)
    assert torch.cuda.memory_reserved() == 24 * MIB
    del second


def test_memory_recorded_on_a_stream_is_free_once_the_host_has_waited():
    stream = torch.cuda.Stream()
    tensor = memory(12 * MIB)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensor.zero_()
    tensor.record_stream(stream)
    del tensor
    second = memory(12 * MIB)
    assert torch.cuda.memory_reserved() == 24 * MIB
    stream.synchronize()
    third = memory(12 * MIB)
    assert torch.cuda.memory_reserved() == 24 * MIB
    del second, third


def test_a_limit_is_kept_and_cached_segments_are_returned_first():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(32 * MIB / total)
    first = memory(24 * MIB)
    del first
    second = memory(30 * MIB)
    assert torch.cuda.memory_reserved() == 30 * MIB
    stats = torch.cuda.memory_stats()
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 4\.00 MiB\. GPU 0 has"):
        memory(4 * MIB)
    assert torch.cuda.memory_stats()["num_ooms"] == stats["num_ooms"] + 1
    del second
    memory(4 * MIB)


def test_the_device_has_no_more_than_its_memory():
    total = torch.cuda.mem_get_info()[1]
    observed.set_total_bytes(64 * MIB)
    try:
        tensor = memory(40 * MIB)
        assert torch.cuda.mem_get_info() == (24 * MIB, 64 * MIB)
        with pytest.raises(torch.OutOfMemoryError):
            memory(26 * MIB)
        del tensor
    finally:
        observed.set_total_bytes(total)


def test_fresh_memory_is_not_zero():
    assert torch.empty(8, device="cuda").isnan().all()


def test_a_result_that_the_cpu_resized_is_the_devices():
    out = torch.empty(0, dtype=torch.int64, device="cuda")
    torch.nonzero(torch.tensor([0, 3, 0, 5], device="cuda"), out=out)
    assert out.tolist() == [[1], [3]]
    assert out.is_cuda
    del out
