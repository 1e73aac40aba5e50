"""Fixtures for all tests, settings for hypothesis, and Triton's interpreter if there is no GPU."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before anything imports triton, which reads it when kernels are defined

import optimized  # before the package is imported

import hf_awq_offload

# Examples are the same in every run: a red build can be repeated. Deadlines measure the machine, not the code.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_llama_dir() -> Path:
    """The trained tiny Llama that comes with the package, with its tokenizer."""
    return Path(hf_awq_offload.__file__).parent / "assets" / "tiny_llama"


@pytest.fixture(scope="session", autouse=True)
def started_optimized() -> None:
    """Has processes that tests start run under -O where the package does.

    A fixture, because only processes that run tests may set it: pytest-xdist's controller would start its workers with
    it, and pytest refuses to run under -O.
    """
    if os.environ.get(optimized.VARIABLE):
        os.environ["PYTHONOPTIMIZE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def peft_of_today() -> None:
    """Lets transformers load adapters with the newest PEFT that the index has: 5.24 asks for 0.22, which it has not."""
    from transformers.integrations import peft

    peft.MIN_PEFT_VERSION = min(peft.MIN_PEFT_VERSION, "0.20.0")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what the runs on the simulated GPU said at their end (simulated_gpu/test_on_simulated_gpu.py)."""
    reports = terminalreporter.stats.get("passed", [])
    said = [value for report in reports for name, value in report.user_properties if name == "simulated GPU"]
    if said:
        terminalreporter.section("on a simulated GPU")
    for line in said:
        terminalreporter.write_line(line)
