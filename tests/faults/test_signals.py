"""Ctrl-C and SIGTERM end the command line with one line, whenever they come, and leave nothing in the way of a repeat.

Processes send themselves signals when they import their Nth module: at_import/sitecustomize.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FAST, SCRIPTS, environment
from killing import digests

from hf_awq_offload.checkpoint.work_folder import InterruptedAfterwards, move_into_place, work_folder
from hf_awq_offload.cli import quantize as command
from hf_awq_offload.cli.main import main
from hf_awq_offload.offload.journal import Journal

AT_IMPORT = Path(__file__).with_name("at_import")
PROGRAMS = {
    "module": [sys.executable, "-m", "hf_awq_offload"],
    "script": [str(SCRIPTS / "hf-awq-offload")],
}
FIRST = 30
"""By this import the package watches for signals; before, it has not begun, and Python itself answers them."""
INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)


def ended(program: str, numbers: list[int], at: int, line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program, which sends itself signals; returns how it ended, within a minute."""
    env = environment(SIGNALS_AT=str(at), SIGNALS=",".join(map(str, numbers)))
    env["PYTHONPATH"] = f"{AT_IMPORT}{os.pathsep}{env['PYTHONPATH']}"
    return subprocess.run([*PROGRAMS[program], *line], cwd=cwd, env=env, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize(
    ("program", "numbers", "at"),
    [
        ("module", [INT], FIRST),
        ("script", [TERM], FIRST),
        ("module", [TERM], 200),
        ("script", [INT, INT], 700),
        ("script", [INT], 2500),
    ],
)
def test_while_the_process_starts(program, numbers, at, tiny_llama_dir, tmp_path):
    result = ended(program, numbers, at, ["quantize", str(tiny_llama_dir), "out", *FAST], tmp_path)
    assert result.returncode == 130
    assert result.stderr == "interrupted: nothing was completed.\n"
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 10])
def test_before_the_package_watches_nothing_has_begun(at, tiny_llama_dir, tmp_path):
    result = ended("script", [TERM], at, ["quantize", str(tiny_llama_dir), "out", *FAST], tmp_path)
    assert result.returncode == -TERM
    assert result.stderr == result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_with_json_stdout_is_a_document(tiny_llama_dir, tmp_path):
    result = ended("script", [TERM], 500, ["inspect", str(tiny_llama_dir), "--json"], tmp_path)
    assert result.returncode == 130
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("Interrupted", 130)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[TERM], [INT, TERM]])
def test_while_the_model_loads_and_then_a_repeat(numbers, tiny_llama_dir, tmp_path):
    line = ["quantize", str(tiny_llama_dir), "out", *FAST]
    result = ended("script", numbers, 4000, line, tmp_path)
    assert "Traceback" not in result.stderr
    if numbers == [TERM]:
        assert result.returncode == 130
        assert result.stderr.splitlines()[-1].startswith("interrupted: no layer was finished")
        assert list(tmp_path.iterdir()) == []
    else:
        assert result.returncode in (130, -TERM, -INT)
        assert not (tmp_path / "out").exists()
    assert ended("module", [], 10**9, line, tmp_path).returncode == 0
    assert ended("module", [], 10**9, [line[0], line[1], "undisturbed", *FAST], tmp_path).returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_once_the_output_is_there_the_message_says_so(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "remove", interrupted)
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *FAST]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"interrupted when {tmp_path / 'out'} was complete")
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_interrupted_upload_says_that_the_output_is_complete(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    class Api:
        def whoami(self):
            return {}

        def create_repo(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "HfApi", Api)
    out = str(tmp_path / "out")
    assert main(["quantize", str(tiny_llama_dir), out, *FAST, "--push-to-hub", "me/model"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"{out} is complete, but was not pushed to me/model. Push it with: hf upload me/model {out}")


@pytest.mark.parametrize("calls", [1, 2])
def test_an_interrupted_move_brings_back_what_was_there(calls, tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    replace, done = os.replace, []

    def interrupted(source, destination):
        replace(source, destination)
        done.append(destination)
        if len(done) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), work_folder(target) as work:  # noqa: PT012
        (work / "checkpoint").mkdir()
        (work / "checkpoint" / "config.json").write_text("new")
        monkeypatch.setattr(os, "replace", interrupted)
        move_into_place(work / "checkpoint", target, work)
    assert (target / "config.json").read_text() == ("old" if calls == 1 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_while_the_old_checkpoint_is_removed_comes_afterwards(tmp_path):
    with pytest.raises(InterruptedAfterwards, match="was complete already"), work_folder(tmp_path / "out") as work:  # noqa: PT012
        (work / "checkpoint").mkdir()
        move_into_place(work / "checkpoint", tmp_path / "out", work)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
