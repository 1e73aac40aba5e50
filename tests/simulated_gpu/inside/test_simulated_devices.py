"""Several devices: the current one, copies between them, and errors when they mix."""

from __future__ import annotations

import pytest
import torch
from simulated_gpu import observed
from simulated_gpu.triton_stand_ins import KernelStandIn

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="this run has one device; the run with two has it"
)


def test_devices_have_memory_of_their_own():
    before = [torch.cuda.memory_allocated(index) for index in range(2)]
    tensor = torch.ones(1024, device="cuda:1")
    assert [torch.cuda.memory_allocated(index) for index in range(2)] == [before[0], before[1] + 4096]
    del tensor


def test_the_current_device_is_a_threads_own_and_comes_back():
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        assert torch.ones(1, device="cuda").device.index == 1
        assert torch.cuda.current_stream().device.index == 1
    assert torch.cuda.current_device() == 0
    with torch.cuda.stream(torch.cuda.Stream(1)):
        assert torch.cuda.current_device() == 1, "a stream brings its device"
    assert torch.cuda.current_device() == 0
    torch.cuda.set_device(1)
    try:
        assert torch.accelerator.current_device_index() == 1
    finally:
        torch.cuda.set_device(0)


def test_an_operation_runs_on_the_device_of_its_tensors():
    tensor = torch.ones(4, device="cuda:1")
    assert (tensor * 2).device.index == 1
    assert torch.cuda.current_device() == 0


def test_there_is_no_third_device():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:2")
    with pytest.raises(AssertionError, match="Invalid device id"):
        torch.cuda.get_device_properties(2)


@pytest.mark.parametrize(
    "operation", [torch.add, torch.matmul, lambda a, b: torch.cat([a, b]), lambda a, b: a.copy_(a) + b]
)
def test_mixing_them_is_an_error(operation):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operation(torch.ones(2, 2, device="cuda:0"), torch.ones(2, 2, device="cuda:1"))


def test_a_copy_between_them_waits_for_both():
    source = torch.arange(12.0, device="cuda:0").view(3, 4)
    there = source.t().to("cuda:1", torch.float64)
    source.zero_()
    assert torch.equal(there.cpu(), torch.arange(12.0, dtype=torch.float64).view(3, 4).t())
    assert observed.findings() == []


def test_a_kernel_that_torch_does_not_see_runs_on_the_current_device():
    kernel = KernelStandIn("double", lambda grid, tensor: tensor.mul_(2), writes=(0,))
    tensor = torch.ones(4, device="cuda:1")
    with pytest.raises(ValueError, match=r"launched on the current device cuda:0, the tensor is on cuda:1"):
        kernel[(1,)](tensor)
    with torch.cuda.device(1):
        kernel[(1,)](tensor)
    assert tensor.tolist() == [2, 2, 2, 2]
