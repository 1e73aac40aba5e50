"""Runs the suites of suites.py on a simulated GPU, each in a process of its own, because that changes torch for good.

What a run prints at its end is shown in the summary of this one; a failure inside fails here, with its output.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simulated_gpu
from simulated_gpu import build
from simulated_gpu.build import why_not
from simulated_gpu.suites import SUITES, Suite

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1800


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_passes_on_a_simulated_gpu(suite, record_property):
    code, output = run(suite)
    if code:
        pytest.fail(f"{suite.name} with {suite.devices} simulated GPU(s) fails:\n{output}", pytrace=False)
    lines = output.strip().splitlines()
    assert any(" passed" in line for line in lines[-3:]), output
    record_property("simulated GPU", f"{suite.name}: {lines[-1].strip('= ')}")


def run(suite: Suite) -> tuple[int, str]:
    """Returns the exit status of pytest and what it printed."""
    paths = os.pathsep.join(filter(None, [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    left_out = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "SIMULATED_GPU_STARTED")  # Triton's interpreter is for the CPU
    environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)} | own
    command = [sys.executable, "-m", "simulated_gpu", "--devices", str(suite.devices), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *suite.arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=SECONDS, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_failure_inside_is_a_failure_with_its_output(tmp_path):
    (tmp_path / "test_wrong.py").write_text("""
import torch
def test_wrong():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = torch.ones(8, device="cuda")
    tensor + 1
    side.synchronize()

def test_right():
    from hf_awq_offload import AwqOffloadConfig
    from hf_awq_offload.pipeline.run_storage import execution_device
    assert torch.cuda.current_device() == 0
    assert execution_device(AwqOffloadConfig()) == torch.device("cuda:1")
""")
    arguments = (str(tmp_path), "--rootdir", str(tmp_path), "--execution-device", "cuda:1")
    code, output = run(Suite("wrong", 2, arguments))
    assert code == 1
    assert "aten::add on the default stream of cuda:0 reads what stream 1 of cuda:0 wrote" in output
    assert "1 failed, 1 passed" in output


def test_it_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(build, "torch_versions", lambda: ("2.13.0+cu130", "13.0"))
    assert build.why_not() == "the simulated GPU needs a CPU build of torch; 2.13.0+cu130 has CUDA of its own"
    monkeypatch.setattr(build, "torch_versions", lambda: ("2.11.0", None))
    assert build.why_not() == "the simulated GPU is written for torch 2.13 and later, this is 2.11.0"
    monkeypatch.setattr(build, "torch_versions", lambda: ("2.13.0", None))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert str(build.why_not()).startswith("the simulated GPU needs a C++ compiler (g++")


def test_this_process_has_none():
    assert not simulated_gpu.is_active()
    assert not hasattr(torch.ops.simulated_gpu, "totals")
