"""The package does the same under `python -O`: nothing that a user may get wrong is left to an assert."""

from __future__ import annotations

import dis
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest
from command_line import environment
from imports import MODULES
from optimized import VARIABLE, WithoutAsserts


def codes(code: CodeType) -> list[CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [code, *(deeper for one in inner for deeper in codes(one))]


def has_asserts(code: CodeType) -> bool:
    return any("ASSERTION" in step.opname for one in codes(code) for step in dis.get_instructions(one))


@pytest.mark.parametrize("name", ["checkpoint.opened", "integrations.quantizer"])
def test_modules_are_compiled_without_asserts(name):
    path = str(MODULES[name])
    assert has_asserts(compile(Path(path).read_bytes(), path, "exec", optimize=0)), "take a module that has some"
    assert not has_asserts(WithoutAsserts("any", path).get_code("any"))


def test_this_process_runs_the_package_without_asserts_if_it_is_to():
    module = importlib.import_module("hf_awq_offload.checkpoint.opened")
    assert isinstance(module.__loader__, WithoutAsserts) == bool(os.environ.get(VARIABLE))


FAULTS = {
    "a field": "AwqOffloadConfig(bits=5)",
    "an unknown field": "AwqOffloadConfig(bit=4)",
    "a size": "AwqOffloadConfig(max_seq_len=-1)",
    "a grid": "AwqOffloadConfig(overrides={'x': {'bits': True}})",
    "a recipe": "AwqOffloadConfig.from_dict([1])",
    "a checkpoint": "plan('/dev', AwqOffloadConfig(n_grid=0, clip=False, rounding='nearest'))",
}


def test_faults_are_told_under_optimization():
    code = ["from hf_awq_offload import AwqOffloadConfig, AwqOffloadError, plan", "assert False, 'not under -O'"]
    for what, fault in FAULTS.items():
        code += ["try:", f"    {fault}", "except AwqOffloadError as error:", f"    print({what!r})"]
    done = subprocess.run(
        [sys.executable, "-O", "-c", "\n".join(code)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == list(FAULTS), done.stderr[-2000:]
