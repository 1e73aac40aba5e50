"""Runs the installed console scripts as processes: what they print, how they end, what a signal leaves behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import FAST, SCRIPTS, document, environment, script
from hub_server import Hub
from killing import digests
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow
NAME = "hf-awq-offload"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny_llama_dir) -> tuple[Path, dict]:
    """The shipped model quantized by the script, and what the script printed."""
    folder = tmp_path_factory.mktemp("quantized")
    result = script(NAME, "quantize", tiny_llama_dir, "out", "--json", *FAST, cwd=folder)
    return folder / "out", document(result.stdout)


def test_quantize_writes_a_checkpoint_and_says_what_was_done(quantized):
    folder, printed = quantized
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert printed["command"] == "quantize"
    assert printed["size_bytes"] == (folder / "model.safetensors").stat().st_size
    assert printed["calibration_tokens"] == 4 * 32
    assert [layer["name"] for layer in printed["layers"]] == [f"model.layers.{index}" for index in range(4)]
    assert all(0 < layer["loss"] < layer["loss_nearest"] for layer in printed["layers"])
    assert printed["left_out"]["lm_head"]


def test_optimums_command_line_does_the_same(quantized, tiny_llama_dir, tmp_path):
    listed = script("optimum-cli", "--help", cwd=tmp_path).stdout
    assert "quantize" in listed
    script("optimum-cli", "quantize", "awq", tiny_llama_dir, "out", "--quiet", *FAST, cwd=tmp_path)
    assert digests(tmp_path / "out") == digests(quantized[0])


def test_optimums_command_line_reports_errors_as_ours(tiny_llama_dir, tmp_path):
    result = script("optimum-cli", "quantize", "awq", "./none", "out", cwd=tmp_path, code=1)
    assert result.stderr.splitlines()[-1].startswith("error: There is no folder ./none")


def test_evaluate_measures_against_the_original(quantized, tiny_llama_dir, tmp_path):
    heldout = tiny_llama_dir / "heldout.txt"
    line = ["--dataset", heldout, "--tokens", "600", "--window", "128", "--new-tokens", "4"]
    found = document(
        script(NAME, "evaluate", quantized[0], "--against", tiny_llama_dir, "--json", *line, cwd=tmp_path).stdout
    )
    assert (found["command"], found["tokens"], found["window_tokens"], found["stride_tokens"]) == (
        "evaluate",
        599,
        128,
        64,
    )
    assert 10 < found["reference_perplexity"] < found["perplexity"] < 100
    assert 0.0005 < found["kl_nats"] < 0.05
    assert 0.8 < found["top1_agreement"] < 1
    assert found["decoding_tokens_per_second"] > 0


def test_evaluate_layer_by_layer_ends_with_4_above_the_bound(quantized, tiny_llama_dir, tmp_path):
    line = ["--against", tiny_llama_dir, "--dataset", tiny_llama_dir / "heldout.txt", "--tokens", "300", "--streamed"]
    line += ["--window", "128", "--dtype", "float32", "--max-kl", "0.0001"]
    found = document(script(NAME, "evaluate", quantized[0], *line, "--json", cwd=tmp_path, code=4).stdout)
    assert found["streamed"]
    assert found["decoding_tokens_per_second"] is None
    assert [layer["name"] for layer in found["layers"]] == [f"model.layers.{index}" for index in range(4)]
    assert found["too_far"]["kl_nats"] == found["kl_nats"] > found["max_kl"] == 0.0001
    assert found["too_far"]["overrides"]
    printed = script(NAME, "evaluate", quantized[0], *line, cwd=tmp_path, code=4).stdout
    assert "KL to base" in printed
    assert "TOO FAR: KL to the original is" in printed
    line[-1] = "10"
    assert document(script(NAME, "evaluate", quantized[0], *line, "--json", cwd=tmp_path).stdout)["too_far"] is None


def test_inspect_finds_damage_and_ends_with_3(quantized, tmp_path):
    printed = script(NAME, "inspect", quantized[0], cwd=tmp_path).stdout
    assert "28 linears of 4 bits, groups of 128, asymmetric" in printed
    assert printed.endswith("no damage found\n")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    tensors = load_file(quantized[0] / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.scales"][0, :3] = float("nan")
    save_file(tensors, damaged / "model.safetensors")
    (damaged / "config.json").write_bytes((quantized[0] / "config.json").read_bytes())
    result = script(NAME, "inspect", damaged, "--json", cwd=tmp_path, code=3)
    found = document(result.stdout)
    assert found["damaged"]
    assert found["findings"] == [
        {
            "is_damage": True,
            "where": "model.layers.2.mlp.up_proj",
            "what": "3 of 1024 scales are not finite",
        }
    ]


def test_convert_there_and_back(quantized, tmp_path):
    line = ["--to", "compressed-tensors", "--scale-dtype", "float16"]
    printed = script(NAME, "convert", quantized[0], "packed", *line, cwd=tmp_path).stdout
    assert printed.startswith("packed: 28 linears from gemm to compressed-tensors")
    # `python -m` is the same program.
    command = [sys.executable, "-m", "hf_awq_offload", "convert", "packed", "back", "--to", "gemm", "--json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert document(result.stdout) == {
        "command": "convert",
        "source": "packed",
        "out": "back",
        "source_format": "compressed-tensors",
        "format": "gemm",
        "linears": 28,
        "size_bytes": (quantized[0] / "model.safetensors").stat().st_size,
    }
    assert digests(tmp_path / "back") == digests(quantized[0])


def test_plan_prints_and_stops(tiny_llama_dir, tmp_path):
    printed = script(NAME, "quantize", tiny_llama_dir, "out", "--plan", *FAST, cwd=tmp_path).stdout
    lines = dict(line.rsplit(maxsplit=1) for line in printed.splitlines())
    assert lines["layers"] == "4"
    assert {"device", "tokens"} <= lines.keys()
    assert list(tmp_path.iterdir()) == []


def test_tasks_of_lm_eval_harness(quantized, tiny_llama_dir, tmp_path):
    """Uses a task of our own, because the harness downloads its own."""
    (tmp_path / "data.json").write_text(
        '[{"q": "Return a list of", "c": [" the", " zzzz"], "a": 0},'
        ' {"q": "The value is", "c": ["qqqq", " not"], "a": 1}]'
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "cloze.yaml").write_text(
        "task: our_cloze\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.json'}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: a\nmetric_list:\n  - metric: acc\n"
    )
    env = environment(HF_HOME=str(tmp_path / "home"))
    line = ["--tasks", "our_cloze", "--tasks-path", "tasks", "--against", tiny_llama_dir, "--json"]
    found = document(script(NAME, "evaluate", quantized[0], *line, cwd=tmp_path, env=env).stdout)
    assert found["tasks"]["our_cloze"]["acc,none"] == found["tasks_against"]["our_cloze"]["acc,none"] == 1


def test_push_to_hub(tiny_llama_dir, tmp_path):
    with Hub("hf_" + "onlyForThisTest") as hub:
        env = environment() | hub.environment(tmp_path / "home")
        line = ["quantize", tiny_llama_dir, "out", "--push-to-hub", "tester/small", *FAST]
        printed = script(NAME, *line, cwd=tmp_path, env=env).stdout
        assert "pushed: " in printed
        files = hub.repositories["tester/small"].files
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
        assert b"tester/small" in files["README.md"]
        assert hub.unknown == []
        refused = script(NAME, *line, "--overwrite", cwd=tmp_path, env=env | {"HF_TOKEN": "hf_wrong"}, code=1)
        assert refused.stderr.splitlines()[-1].startswith("error: ")
        assert "Quantizing" not in refused.stderr


def interrupted(number: int, line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script and sends it a signal once the journal has a layer."""
    process = subprocess.Popen(
        [str(SCRIPTS / NAME), *line],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not list((cwd / "out.journal").glob("layer-*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def test_an_interrupted_run_is_resumed_to_the_same_bits(quantized, tiny_llama_dir, tmp_path):
    line = ["quantize", str(tiny_llama_dir), "out", *FAST]
    first = interrupted(signal.SIGINT, line, tmp_path)
    assert first.returncode == 130
    last = first.stderr.splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert "Traceback" not in first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.journal"]
    refused = script(NAME, *line, cwd=tmp_path, code=1)
    assert "Continue that run with --resume" in refused.stderr.splitlines()[-1]
    command = shlex.split(last.partition("resume with: ")[2])
    assert command == [NAME, *line, "--resume"]
    script(command[0], *command[1:], cwd=tmp_path)
    assert digests(tmp_path / "out") == digests(quantized[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigterm_is_an_interruption_too(tiny_llama_dir, tmp_path):
    line = ["quantize", str(tiny_llama_dir), "out", "--json", *FAST]
    ended = interrupted(signal.SIGTERM, line, tmp_path)
    assert ended.returncode == 130
    error = document(ended.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("Interrupted", 130)
    assert "--resume" in error["message"]


def test_the_demo(tmp_path):
    result = script(NAME, "demo", "--json", "--no-speed", "--out", "kept", cwd=tmp_path)
    rows = document(result.stdout)["rows"]
    assert [row["method"].partition(",")[0] for row in rows] == ["full precision", "round to nearest", "AWQ"]
    assert rows[2]["evaluation"]["kl_nats"] < rows[1]["evaluation"]["kl_nats"]
    assert (tmp_path / "kept" / "config.json").is_file()
