"""A process in which nothing else has used the package reads sources in the same way.

In the process of a test, some import has registered the package with transformers long before.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, script
from made_sources import MADE
from models import tiny_qwen3
from quantized_sources import fp8_blocks, save_quantized

from hf_awq_offload.checkpoint.opened import read_json

FAST = ["--group-size", "32", "--n-grid", "0", "--no-clip", "--rounding", "nearest"]
WITHOUT_DATA = "group_size=32, n_grid=0, clip=False, rounding='nearest'"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    return save_quantized(tiny_qwen3(), tmp_path_factory.mktemp("source") / "fp8", *fp8_blocks(32))


def is_dequantized(out: Path) -> bool:
    return "fp8" in read_json(out / "config.json")["quantization_config"]["meta"]["dequantized_from"]


def test_on_the_command_line(fp8, tmp_path):
    script("hf-awq-offload", "quantize", fp8, "out", "--plan", *FAST, cwd=tmp_path)
    script("hf-awq-offload", "quantize", fp8, "out", *FAST, cwd=tmp_path)
    assert is_dequantized(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_on_the_command_line(tmp_path):
    adapters = MADE["a folder of adapters"](tmp_path / "adapters")
    failed = script("hf-awq-offload", "quantize", adapters, "out", *FAST, cwd=tmp_path, code=1)
    assert "Merge the adapter first" in failed.stderr


@pytest.mark.parametrize("home", ["hf_awq_offload", "hf_awq_offload.streamed"])
def test_from_python(home, fp8, tmp_path):
    code = (
        f"from {home} import quantize\nfrom hf_awq_offload.config import AwqOffloadConfig\n"
        f"quantize({str(fp8)!r}, 'out', AwqOffloadConfig({WITHOUT_DATA}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert is_dequantized(tmp_path / "out")


def test_while_it_loads(fp8, tmp_path):
    code = (
        "from hf_awq_offload import AwqOffloadConfig\nfrom transformers import AutoModelForCausalLM\n"
        f"recipe = AwqOffloadConfig({WITHOUT_DATA})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(fp8)!r}, quantization_config=recipe)\n"
        "model.save_pretrained('out')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert is_dequantized(tmp_path / "out")
