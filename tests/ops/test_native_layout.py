"""Tests that the cpu backend's layout replaces the AWQ words, which are restored whenever they are needed."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from models import random_awq_linear
from torch import Tensor

from hf_awq_offload import AwqLinear, ops
from hf_awq_offload.formats.awq import PackedWeight, pack_columns
from hf_awq_offload.ops import cpu_backend, dispatch

pytestmark = pytest.mark.skipif(cpu_backend.cpu_layout() is None, reason="torch has no int4 packing on this CPU")


@pytest.fixture(autouse=True)
def without_c_kernels(monkeypatch):
    """Simulates a machine without a compiler, where the cpu backend comes first."""
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("cpu",))
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def make(**kwargs) -> AwqLinear:
    return random_awq_linear(256, 128, group_size=64, dtype=torch.bfloat16, **kwargs)


def run(linear: AwqLinear, rows: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return linear(torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype))


def is_native(linear: AwqLinear) -> bool:
    """Returns whether the native layout is held; asserts that exactly one of the two layouts is."""
    native = linear.native_words is not None
    assert native == (linear.native_parameters is not None)
    assert native != ("qweight" in linear._parameters)
    return native


@given(
    st.integers(1, 6),  # groups
    st.sampled_from([32, 64, 96, 128, 256]),
    st.sampled_from([64, 128, 192, 1024, 1088]),
    st.integers(0, 2**32 - 1),
)
def test_words_come_back_to_the_bit(groups, group_size, out_features, seed):
    generator = torch.Generator().manual_seed(seed)
    in_features = groups * group_size
    codes = torch.randint(16, (in_features, out_features), generator=generator)
    zeros = torch.randint(16, (groups, out_features), generator=generator)
    scales = torch.rand(groups, out_features, generator=generator).half()
    packed = PackedWeight(pack_columns(codes), pack_columns(zeros), scales)
    native = cpu_backend.BACKEND.pack(packed)
    assert native.words.nbytes == packed.qweight.nbytes
    assert torch.equal(cpu_backend.BACKEND.unpack(native.words, in_features, out_features), packed.qweight)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("halves", [True, False])
def test_the_layouts_of_other_cpus_are_read_as_torch_writes_them(block, halves):
    """In torch's source (Int4mmKernel.cpp), byte j of an input channel in a block holds two output channels."""
    codes = torch.randint(16, (128, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)  # (N, K)
    written = []
    for first in range(0, 128, block):
        for k in range(8):
            for j in range(block // 2):
                low, high = (j, j + block // 2) if halves else (2 * j, 2 * j + 1)
                written.append(int(codes[first + low, k]) | int(codes[first + high, k]) << 4)
    words = torch.tensor(written, dtype=torch.uint8).view(128, 4)
    assert torch.equal(cpu_backend._read(words, 8, cpu_backend.Layout(block, halves)), codes.t())


def test_the_first_forward_pass_lets_go_of_the_words():
    linear = make(bias=True)
    before = sum(parameter.nbytes for parameter in linear.parameters())
    assert not is_native(linear)
    run(linear)
    assert is_native(linear)
    assert {name for name, _ in linear.named_parameters()} == {
        "qzeros",
        "scales",
        "bias",
        "native_words",
        "native_parameters",
    }
    added = linear.native_parameters.nbytes
    assert sum(parameter.nbytes for parameter in linear.parameters()) == before + added


WANTS_WORDS = {
    "reading qweight": lambda linear: linear.qweight,
    "reading packed": lambda linear: linear.packed,
    "state_dict": lambda linear: linear.state_dict(),
    "to a dtype": lambda linear: linear.to(torch.float32),
    "to a device": lambda linear: linear.to("cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "load_state_dict": lambda linear: linear.load_state_dict(make().state_dict()),
}


@pytest.mark.parametrize("wants", WANTS_WORDS.values(), ids=WANTS_WORDS)
def test_whatever_wants_the_words_gets_them_and_the_next_pass_packs_again(wants):
    linear, untouched = make(), make()
    expected = run(linear)
    wants(linear)
    assert not is_native(linear)
    assert list(linear._parameters)[:3] == ["qweight", "qzeros", "scales"]
    for tensor, original in zip(linear.packed, untouched.packed, strict=True):
        assert torch.equal(tensor, original)
    assert torch.equal(run(linear), expected)
    assert is_native(linear)


def test_the_state_dict_is_that_of_the_format_in_either_layout():
    linear = make(bias=True)
    run(linear)
    assert linear.state_dict().keys() == {"qweight", "qzeros", "scales", "bias"}


@pytest.mark.parametrize("save", [torch.save, lambda linear, file: file.write(pickle.dumps(linear))])
def test_the_layout_of_one_cpu_is_never_saved(save):
    linear = make()
    expected = run(linear)
    file = io.BytesIO()
    save(linear, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert not is_native(loaded)
    assert torch.equal(run(loaded), expected)


def test_other_weights_loaded_after_a_pass_are_used():
    linear, other = make(), make(seed=1)
    run(linear)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(run(linear), run(other))


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_change_in_place_is_honoured(name):
    linear, expected = make(), make()
    run(linear)
    for changed in (linear, expected):
        tensor = getattr(changed, name)
        tensor.mul_(2) if name == "scales" else tensor.zero_()
    assert torch.equal(run(linear), run(expected))
    assert torch.equal(linear.weight, expected.weight)


def test_the_weight_is_the_same_in_either_layout():
    linear = make()
    before = linear.weight
    run(linear)
    assert is_native(linear)
    assert torch.equal(linear.weight, before)
    assert is_native(linear)


def test_packed_in_inference_mode_it_can_still_be_trained_through():
    linear = make()
    with torch.inference_mode():
        run(linear)
        linear.state_dict()
        run(linear)
    x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert not any(parameter.is_inference() for parameter in linear.parameters())


def test_what_accelerate_offloads_is_not_packed_for_a_single_pass():
    linear = make()
    expected = run(make())
    cpu_offload(linear, execution_device=torch.device("cpu"))
    for _ in range(2):
        error = (run(linear) - expected).float().norm() / expected.float().norm()
        assert error < torch.finfo(torch.bfloat16).eps
        assert linear.native_words is None


def test_an_input_that_the_backend_refuses_gets_the_words():
    linear = make()
    run(linear)
    output = run(linear, dtype=torch.float64)
    assert output.dtype == torch.float64
    assert not is_native(linear)


def test_threads_that_race_for_the_first_pass_all_get_the_result():
    expected = run(make())
    for _ in range(20):
        linear = make()
        results: list[Tensor | BaseException] = []

        def work(linear=linear, results=results):
            try:
                results.append(run(linear))
                linear.state_dict()
                results.append(run(linear))
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 8
        for result in results:
            assert isinstance(result, Tensor), result
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-1)


def test_words_of_another_size_are_refused_before_the_kernel():
    packed = make().packed
    native = cpu_backend.BACKEND.pack(packed)
    short = ops.NativeWeight(native.words[:64], native.parameters)
    with pytest.raises(ValueError, match="are not those of a linear of 256 to 128 channels"):
        ops.linear_native(torch.randn(2, 256), short, packed.qzeros, packed.scales, "cpu")
