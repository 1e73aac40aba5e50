"""The scripts that the documentation shows run as they stand, against a hub on loopback where they push."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ARGUMENTS = {
    "lora.py": ["--steps", "3", "--push", "tester/adapters"],
    "quantize_after_training.py": ["--steps", "1", "--push", "tester/tuned"],
    "push_and_load.py": ["tester/model"],
}
PUSHED = {
    "lora.py": ("tester/adapters", {"adapter_config.json", "adapter_model.safetensors"}),
    "quantize_after_training.py": ("tester/tuned", {"config.json", "model.safetensors", "tokenizer.json", "README.md"}),
    "push_and_load.py": ("tester/model", {"config.json", "model.safetensors", "tokenizer.json", "README.md"}),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == ARGUMENTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_example_runs_and_pushes(name, tmp_path):
    with Hub("hf_" + "onlyForThisTest") as hub:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.strip()
        repository, files = PUSHED[name]
        assert files <= hub.repositories[repository].files.keys()
        assert hub.unknown == []


def test_the_pages_show_the_examples():
    pages = "".join(path.read_text(encoding="utf-8") for path in EXAMPLES.parent.glob("*.md"))
    for name in ARGUMENTS:
        assert f"examples/{name}" in pages
