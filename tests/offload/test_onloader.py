"""The onloader moves one layer to the device, in the dtype that it computes in."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_awq_offload.offload.devices import default_execution_device
from hf_awq_offload.offload.memory_use import peak_memory_bytes
from hf_awq_offload.offload.onloader import onloaded
from hf_awq_offload.ops.blocks import matmul_dtype

CPU = torch.device("cpu")


class Layer(nn.Module):
    """Records where it is moved, so that this machine need not have the device."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(3))
        self.sent_to: list[torch.device] = []

    def to(self, *args, **kwargs):
        self.sent_to.append(torch.device(args[0]))
        return self

    def forward(self, x):
        return self.fc(x)


ELSEWHERE = torch.device("meta")


def devices(layer: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*layer.parameters(), *layer.buffers()]}


def test_a_layer_is_on_the_device_inside_and_on_the_cpu_afterwards():
    layer = Layer()
    with onloaded(layer, ELSEWHERE) as inside:
        assert inside is layer
        assert layer.sent_to[-1] == ELSEWHERE
    assert layer.sent_to[-1] == CPU


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_layer_is_back_on_the_cpu_after_an_error(error):
    layer = Layer()

    def fail():
        raise error("inside")

    with pytest.raises(error, match="inside"), onloaded(layer, ELSEWHERE):
        fail()
    assert layer.sent_to[-1] == CPU
    assert not hasattr(layer, "_hf_hook")


def test_a_layer_is_back_on_the_cpu_when_there_is_no_room_for_it():
    class TooLarge(Layer):
        def to(self, *args, **kwargs):
            super().to(*args, **kwargs)
            if self.sent_to[-1] == ELSEWHERE:
                raise torch.OutOfMemoryError("no room")
            return self

    layer = TooLarge()
    with pytest.raises(torch.OutOfMemoryError), onloaded(layer, ELSEWHERE):
        pass
    assert layer.sent_to[-1] == CPU
    assert not hasattr(layer, "_hf_hook")


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("fails", [False, True])
def test_every_tensor_travels_to_an_accelerator_and_back(fails):
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    device = default_execution_device()
    try:
        with onloaded(layer, device):
            assert devices(layer) == {device.type}
            layer[0] = nn.Linear(4, 8, device=device)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert devices(layer) == {"cpu"}
    assert layer[0].out_features == 8
    assert torch.equal(layer[1].running_mean, expected["1.running_mean"])


def test_a_module_replaced_inside_survives_and_travels_back():
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    replacement = nn.Linear(4, 2)
    with onloaded(layer, CPU):
        layer[0] = replacement
    assert layer[0] is replacement
    assert devices(layer) == {"cpu"}
    assert layer(torch.zeros(1, 4)).shape == (1, 2)


def test_parameters_are_the_same_objects_with_the_same_values_afterwards():
    layer = nn.Linear(4, 4)
    weight, values = layer.weight, layer.weight.detach().clone()
    with onloaded(layer, CPU):
        pass
    assert layer.weight is weight
    assert torch.equal(weight, values)


def test_no_hook_and_no_wrapped_forward_is_left_behind():
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = {name: set(vars(module)) for name, module in layer.named_modules()}
    with onloaded(layer, CPU):
        layer(torch.zeros(1, 4))
    for name, module in layer.named_modules():
        assert not hasattr(module, "_hf_hook")
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert set(vars(module)) == before[name]


def test_a_layer_can_be_copied_and_pickled_afterwards():
    layer = nn.Linear(4, 4)
    with onloaded(layer, CPU):
        pass
    x = torch.ones(1, 4)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(copied(x), copied.bias.unsqueeze(0))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_layer_can_be_onloaded_again_and_again():
    layer = nn.Linear(4, 4)
    expected = layer(torch.ones(1, 4))
    for _ in range(3):
        with onloaded(layer, CPU):
            assert torch.equal(layer(torch.ones(1, 4)), expected)


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_accelerator_computes_in_the_dtype_of_the_layer(device, dtype):
    assert matmul_dtype(device, dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cpu_computes_in_the_dtype_of_a_layer_that_has_full_precision(dtype):
    assert matmul_dtype("cpu", dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_supported", [True, False])
def test_a_cpu_without_instructions_for_half_precision_computes_in_fp32(monkeypatch, dtype, is_supported):
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: is_supported)
    matmul_dtype.cache_clear()
    try:
        assert matmul_dtype("cpu", dtype) == (dtype if is_supported else torch.float32)
    finally:
        matmul_dtype.cache_clear()


def test_the_execution_device_is_the_accelerator_or_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_execution_device() == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert default_execution_device() == torch.device("cuda", 1)


def test_peak_memory_on_a_cpu_is_that_of_the_process_in_bytes():
    peak_bytes = peak_memory_bytes(CPU)
    assert 2**26 < peak_bytes < 2**40
    assert peak_memory_bytes(CPU) >= peak_bytes


def test_weights_that_begin_anywhere_in_a_mapped_file_are_aligned_while_a_layer_runs():
    layer = nn.Linear(16, 16, bias=False)
    memory = bytearray(64 + 4 * 16 * 16)
    start = (8 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr()) % 64
    unaligned = torch.frombuffer(memory, offset=start, dtype=torch.float32, count=256).view(16, 16)
    unaligned.copy_(layer.weight.detach())
    expected = unaligned.clone()
    layer.weight.data = unaligned
    parameter = layer.weight
    with onloaded(layer, torch.device("cpu")):
        assert layer.weight.data_ptr() % 64 == 0
    assert layer.weight is parameter
    assert torch.equal(layer.weight, expected)
