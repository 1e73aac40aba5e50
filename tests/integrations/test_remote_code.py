"""Code that comes with a checkpoint, and pickles, run only where the user says so; nobody is asked in vain."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT, environment
from models import save_model, tiny_llama, token_recipe
from safetensors.torch import load_file

from hf_awq_offload import AwqOffloadError, CalibrationDataError, quantize
from hf_awq_offload.calibration.sources import open_source
from hf_awq_offload.config import AwqOffloadConfig
from hf_awq_offload.integrations.origin import Origin

CODE = """
from pathlib import Path
Path({canary!r}).write_text("the code has run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "llama-of-mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
FAST = "group_size=32, n_grid=0, clip=False, rounding='nearest'"
WITHOUT_DATA = ["--group-size", "32", "--n-grid", "0", "--no-clip", "--rounding", "nearest"]
SECONDS = 300


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("source") / "llama")


def with_code(source: Path, folder: Path, own_type: bool) -> tuple[Path, Path]:
    """Copies a checkpoint and adds code; `own_type`: it can't be loaded without. Returns it and the canary."""
    shutil.copytree(source, folder)
    canary = folder.parent / "canary"
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    if own_type:
        config["model_type"] = "llama-of-mine"
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder, canary


RUNS = {
    "quantize": ["quantize", "SRC", "out", *WITHOUT_DATA],
    "quantize with data": ["quantize", "SRC", "out", "--group-size", "32", "--n-samples", "2", "--max-seq-len", "16"],
    "plan": ["quantize", "SRC", "out", "--plan", *WITHOUT_DATA],
    "evaluate": ["evaluate", "SRC", "--dataset", "text.txt", "--tokens", "50"],
    "inspect": ["inspect", "SRC"],
    "convert": ["convert", "SRC", "out", "--to", "gemm"],
}


def run(arguments: list[str], cwd: Path, stdin: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process whose stdin is closed, or a pipe that nobody writes to."""
    command = [sys.executable, *arguments]
    if stdin == "closed":
        command = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command]
    given = {"stdin": subprocess.PIPE} if stdin == "pipe" else {"stdin": subprocess.DEVNULL}
    with subprocess.Popen(  # unlike `run`, leaves the pipe open
        command,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **given,  # type: ignore[call-overload]
    ) as process:
        try:
            assert process.stdout is not None
            output = process.stdout.read()
            code = process.wait(timeout=SECONDS)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, code, output, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "stdin"),
    [
        *(("quantize", "closed"), ("quantize", "pipe"), ("quantize with data", "pipe"), ("plan", "closed")),
        *(("evaluate", "pipe"), ("inspect", "closed"), ("convert", "pipe")),
    ],
)
def test_code_does_not_run_unless_it_is_trusted(what, stdin, llama, tmp_path):
    folder, canary = with_code(llama, tmp_path / "theirs", own_type=True)
    (tmp_path / "text.txt").write_text("some text " * 50)
    words = [str(folder) if word == "SRC" else word for word in RUNS[what]]
    done = run(["-m", "hf_awq_offload", *words], tmp_path, stdin)
    assert not canary.exists()
    assert "y/N" not in done.stdout, "somebody was asked"
    assert "Traceback" not in done.stdout
    if what not in ("inspect", "convert"):
        assert done.returncode != 0
        assert "trust" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stdin"), [("from_pretrained", "closed"), ("quantize_model", "pipe")])
def test_code_beside_a_model_that_needs_none_does_not_run(way, stdin, llama, tmp_path):
    folder, canary = with_code(llama, tmp_path / "theirs", own_type=False)
    lines = {
        "from_pretrained": [
            "AutoModelForCausalLM.from_pretrained(path, quantization_config=AwqOffloadConfig(RECIPE))",
        ],
        "quantize_model": [
            "from hf_awq_offload import quantize_model, AwqOffloadError",
            "from transformers import LlamaForCausalLM",
            "model = LlamaForCausalLM.from_pretrained(path)",
            "try: quantize_model(model, AwqOffloadConfig(group_size=32, n_samples=2, max_seq_len=16))",
            "except AwqOffloadError as error: print(error)",
        ],
    }[way]
    code = [
        "from hf_awq_offload import AwqOffloadConfig",
        "from transformers import AutoModelForCausalLM",
        f"path = {str(folder)!r}",
        *lines,
    ]
    done = run(["-c", "\n".join(code).replace("RECIPE", FAST)], tmp_path, stdin)
    assert done.returncode == 0, done.stdout[-2000:]
    assert not canary.exists()
    assert "y/N" not in done.stdout


@pytest.mark.slow
def test_code_that_is_trusted_runs_on_the_command_line(llama, tmp_path):
    folder, canary = with_code(llama, tmp_path / "theirs", own_type=True)
    words = ["quantize", str(folder), "out", *WITHOUT_DATA, "--trust-remote-code"]
    done = run(["-m", "hf_awq_offload", *words], tmp_path, "pipe")
    assert done.returncode == 0, done.stdout[-2000:]
    assert canary.exists()
    assert (tmp_path / "out" / "own.py").is_file(), "the code comes along"


@pytest.mark.parametrize("trusted", [True, False])
def test_what_the_user_said_reaches_tokenizer_and_processor(trusted):
    origin = Origin("org/model", {"trust_remote_code": trusted, "subfolder": "a"})
    assert origin.arguments_here(in_subfolder=True)["trust_remote_code"] is trusted
    assert origin.arguments_elsewhere["trust_remote_code"] is trusted


def test_without_a_terminal_nobody_is_asked(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert Origin("org/model").arguments_here(in_subfolder=False) == {"trust_remote_code": False}
    assert Origin("org/model").arguments_elsewhere == {"trust_remote_code": False}


# -- pickles -----------------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_nothing_is_unpickled_from_a_checkpoint(llama, tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "theirs"
    shutil.copytree(llama, folder)
    torch.save({**load_file(folder / "model.safetensors"), "evil": Evil(canary)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(AwqOffloadError, match=r"pytorch_model\.bin"):
        quantize(folder, tmp_path / "out", token_recipe())
    assert not canary.exists()


def test_pickles_beside_a_checkpoint_are_left_alone(llama, tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "theirs"
    shutil.copytree(llama, folder)
    for name in ("training_args.bin", "optimizer.pt", "extra.pkl", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    quantize(folder, tmp_path / "out", token_recipe())
    assert not canary.exists()
    assert not {path.suffix for path in (tmp_path / "out").iterdir()} & {".bin", ".pt", ".pkl"}


def test_a_script_in_a_folder_of_data_does_not_run(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    canary = tmp_path / "canary"
    (folder / "data.py").write_text(CODE.format(canary=str(canary)))
    (folder / "rows.pkl").write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(CalibrationDataError):
        list(open_source(AwqOffloadConfig(dataset=str(folder)), lambda: None).elements)  # type: ignore[arg-type, return-value]
    assert not canary.exists()


def test_no_module_unpickles():
    """What can run code when it reads: each is called so that it can't, or not at all."""
    for path in sorted((ROOT / "hf_awq_offload").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "pickle.load" not in text, path
        assert "allow_pickle=True" not in text, path
        assert "np.load(" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert "yaml.unsafe" not in text, path
        assert "yaml.FullLoader" not in text, path
        assert text.count("yaml.load(") == text.count(", Loader)"), path
        assert "eval(" not in text.replace(".eval()", "").replace("_eval(", ""), path
        assert "exec(" not in text, path
