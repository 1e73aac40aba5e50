"""What a failed `quantize` advises: to resume only where that can help, and never to delete what a run is using."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FAST
from killing import digests

from hf_awq_offload.cli.main import main
from hf_awq_offload.errors import CalibrationDataError, ConfigError, MemoryLimitError, NumericalError, StorageError
from hf_awq_offload.offload.journal import Journal
from hf_awq_offload.pipeline import loop

LEFT_OUT = ["--modules-to-not-convert", "model.layers.2.mlp"]


def fail_on_layer_2(monkeypatch, error: Exception) -> list[str]:
    """Makes a run fail on the third layer unless its MLP stays in full precision; returns the layers that are done."""
    done = []
    original = loop.quantize_with_statistics

    def failing(context, *args, **kwargs):
        if context.name == "model.layers.2" and "mlp.up_proj" in context.quantizable:
            raise error
        done.append(context.name)
        return original(context, *args, **kwargs)

    monkeypatch.setattr(loop, "quantize_with_statistics", failing)
    return done


def error_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", [NumericalError, CalibrationDataError, ConfigError])
def test_an_error_that_would_come_again_asks_for_a_change_and_the_change_keeps_layers(
    kind, tiny_llama_dir, tmp_path, monkeypatch, capsys
):
    done = fail_on_layer_2(monkeypatch, kind("Layer 2 is bad."))
    line = ["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *FAST]
    assert main(line) == (2 if kind is ConfigError else 1)
    said = error_line(capsys)
    assert "Layer 2 is bad. The same command would fail again. 2 layers finished, kept in" in said
    assert "except for --modules-to-not-convert and --overrides" in said
    assert "resume with:" not in said
    assert main([*line, *LEFT_OUT, "--resume"]) == 0
    assert done == [f"model.layers.{index}" for index in range(4)]
    monkeypatch.undo()
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "other"), *FAST, *LEFT_OUT]) == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


@pytest.mark.parametrize("error", [StorageError("The disk is full."), MemoryLimitError("No room."), RuntimeError("?")])
def test_an_error_that_may_pass_names_the_command_that_resumes(error, tiny_llama_dir, tmp_path, monkeypatch, capsys):
    fail_on_layer_2(monkeypatch, error)
    line = ["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *FAST]
    assert main(line) == 1
    said = error_line(capsys)
    assert f"{error} 2 layers finished" in said
    assert said.endswith("--resume")


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_journal_that_a_run_is_using_is_left_alone(layers, resume, tiny_llama_dir, tmp_path, capsys):
    folder = tmp_path / "out.journal"
    running = Journal(folder, {"source": "a"})
    for index in range(layers):
        running.commit(index, f"layer.{index}", {}, 1, {}, None)
    running.settle()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *FAST, *resume]) == 1
    said = error_line(capsys)
    assert f"is in use by process {os.getpid()} on " in said
    assert "delete the folder" not in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    running.close()


def test_a_mistyped_dtype_costs_no_import_of_torch(tmp_path):
    code = (
        "import sys; from hf_awq_offload.cli.main import main; "
        "code = main(['quantize', 'a/b', 'out', '--dtype', 'float17']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert b"--dtype is 'float17'; pass one of auto, bfloat16, float16, float32" in result.stderr
