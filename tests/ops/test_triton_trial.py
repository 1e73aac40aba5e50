"""Tests the trial launch that tells whether Triton works; a patched launch stands for a device that is not there."""

from __future__ import annotations

import subprocess

import pytest
import torch
from backends import needs_gpu, needs_triton

from hf_awq_offload import QuantizedWeightError
from hf_awq_offload.triton_trial import trial, triton_refusal

pytestmark = needs_triton
CARD = torch.device("cuda", 1)


class Launch:
    """Stands for the trial launch: raises what it is given, and notes on which devices it was called."""

    def __init__(self, *errors: Exception | None):
        self.errors, self.devices = list(errors), []

    def __call__(self, device: torch.device) -> None:
        self.devices.append(device)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(trial, "_tried", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a CPU build of torch can't ask

    def patched(*errors: Exception | None) -> Launch:
        launch = Launch(*errors)
        monkeypatch.setattr(trial, "_launch", launch)
        return launch

    return patched


def test_each_device_is_tried_once(launch):
    tried = launch()
    assert triton_refusal(CARD) is triton_refusal(CARD) is triton_refusal(torch.device("cuda", 0)) is None
    assert tried.devices == [CARD, torch.device("cuda", 0)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please specify\nmore"), "Failed to find C compiler. Please specify"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "returned non-zero exit status 1"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "Permission denied: '/root/.triton'"),
        (ImportError(), "ImportError"),
    ],
    ids=["no compiler", "no headers", "no cache folder", "no message"],
)
def test_the_first_line_of_what_goes_wrong_is_the_reason(launch, error, reason, caplog):
    tried = launch(error)
    with caplog.at_level("WARNING", "transformers"):
        refusal = triton_refusal(CARD)
    assert refusal.startswith("triton can't compile a kernel here: ")
    assert reason in refusal
    assert "more" not in refusal
    assert triton_refusal(CARD) == refusal
    assert len(tried.devices) == 1


def test_memory_that_ran_out_says_nothing_about_triton(launch):
    launch(torch.OutOfMemoryError("CUDA out of memory."), None)
    with pytest.raises(torch.OutOfMemoryError):
        triton_refusal(CARD)
    assert triton_refusal(CARD) is None


def test_nothing_is_tried_inside_a_cuda_graph(launch, monkeypatch):
    tried = launch()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(QuantizedWeightError, match="Expected: a forward pass before the capture"):
        triton_refusal(CARD)
    assert tried.devices == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert triton_refusal(CARD) is None
    assert tried.devices == [CARD]


def test_what_was_tried_before_is_known_inside_a_cuda_graph(launch, monkeypatch):
    launch()
    triton_refusal(CARD)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_refusal(CARD) is None


def test_modes_of_the_caller_do_not_reach_the_trial(launch, monkeypatch):
    """A launch on fake tensors would fail, and Triton would be given up for good."""
    seen = []
    launch()
    monkeypatch.setattr(trial, "_launch", lambda device: seen.append(type(torch.empty(1))))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert triton_refusal(CARD) is None
    assert seen == [torch.Tensor]


def test_a_kernel_that_writes_nothing_is_noticed(monkeypatch):
    """The launch itself, on the CPU: in Triton's interpreter, or with a kernel that does nothing."""
    from hf_awq_offload.triton_trial import kernel

    class Idle:
        def __getitem__(self, grid):
            return lambda target, **constants: None

    monkeypatch.setattr(kernel, "trial_kernel", Idle())
    with pytest.raises(RuntimeError, match="should write 7 wrote 0"):
        trial._launch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def test_the_kernel_writes_its_value():
    trial._launch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA and ROCm" in triton_refusal(torch.device("cpu"))


@needs_gpu
def test_on_a_real_card_with_a_compiler_it_works():
    assert triton_refusal(torch.device("cuda")) is None
