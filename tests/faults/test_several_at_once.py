"""Several quantizations: after each other, in threads, in processes on one output, after a fork."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import FAST, SCRIPTS, environment
from killing import digests
from models import save_model, tiny_llama, token_recipe
from transformers import AutoModelForCausalLM

from hf_awq_offload import AwqOffloadConfig, ConfigError, JournalError, quantize
from hf_awq_offload.checkpoint.durable import locked
from hf_awq_offload.offload.journal import Journal

NAME = "hf-awq-offload"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Two models of different dtypes."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "fp32": save_model(tiny_llama(), folder / "fp32"),
        "bf16": save_model(tiny_llama(seed=1).to(torch.bfloat16), folder / "bf16"),
    }


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("one-by-one")
    for name, source in sources.items():
        quantize(source, folder / name, recipe())
    return {name: digests(folder / name) for name in sources}


def recipe() -> AwqOffloadConfig:
    return token_recipe(n_grid=2)


def through_from_pretrained(source: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=recipe())
    model.save_pretrained(out)


def through_quantize(source: Path, out: Path) -> None:
    quantize(source, out, recipe())


@pytest.mark.parametrize("first", [through_from_pretrained, through_quantize])
def test_two_threads_give_what_one_after_the_other_gives(first, sources, expected, tmp_path):
    threads = [
        threading.Thread(target=first, args=(sources["fp32"], tmp_path / "fp32")),
        threading.Thread(target=through_from_pretrained, args=(sources["bf16"], tmp_path / "bf16")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert {name: digests(tmp_path / name) for name in sources} == expected
    assert torch.get_default_dtype() == torch.float32


def test_loading_another_model_meanwhile_is_warned_of(sources, tmp_path, monkeypatch, caplog):
    commit, loaded = Journal.commit, []

    def loading(self, *args, **kwargs):
        if not loaded:
            load = lambda: loaded.append(AutoModelForCausalLM.from_pretrained(sources["bf16"], dtype="auto"))  # noqa: E731
            thread = threading.Thread(target=load)
            thread.start()
            thread.join()
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(Journal, "commit", loading)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        quantize(sources["fp32"], tmp_path / "out", recipe())
    finally:
        logger.removeHandler(caplog.handler)
    assert len(loaded) == 1
    assert "A model is loaded while another thread quantizes one" in caplog.text


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tiny_llama_dir, tmp_path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun to write `out`, and is stopped there."""
    line = ["quantize", str(tiny_llama_dir), "out", *FAST, "--quiet"]
    process = subprocess.Popen([str(SCRIPTS / NAME), *line], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not (tmp_path / "out.journal" / "layer-00000.json").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_who_has_the_output(running, sources, tiny_llama_dir, tmp_path):
    with pytest.raises(ConfigError, match=rf"out is being written by process {running.pid} on \S+; wait for it"):
        quantize(sources["fp32"], tmp_path / "out", recipe())
    with pytest.raises(JournalError, match=rf"is in use by process {running.pid} on "):
        quantize(sources["fp32"], tmp_path / "other", recipe(), checkpoint_dir=tmp_path / "out.journal")
    running.send_signal(signal.SIGCONT)
    assert running.wait(300) == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FORKED = """
import os, sys
from pathlib import Path
import torch
from models import save_model, tiny_llama, token_recipe
from killing import digests
from hf_awq_offload import quantize

folder = Path(sys.argv[1])
source = save_model(tiny_llama(hidden_size=128, intermediate_size=256), folder / "source")
torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)  # starts OpenMP's threads, which a forked process does not have
torch.randn(2**21).exp().sum()
child = os.fork()
if child == 0:
    quantize(source, folder / "child", token_recipe(n_grid=1, clip=False))
    print("threads:", torch.get_num_threads(), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
torch.set_num_threads(1)
quantize(source, folder / "parent", token_recipe(n_grid=1, clip=False))
assert digests(folder / "child") == digests(folder / "parent")
"""


def test_a_forked_process_quantizes_too(tmp_path):
    env = environment(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env["PYTHONPATH"]])
    result = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path)], env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "the quantization works with one thread" in result.stderr
    assert "threads: 2" in result.stdout  # as before, once it is done


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_hold_the_lock_of_the_one_that_has_ended(tmp_path):
    opened = locked(tmp_path / "lock")
    until_parent_is_done, parent_is_done = os.pipe()
    until_child_runs, child_runs = os.pipe()
    child = os.fork()
    if child == 0:  # outlives the lock
        os.close(parent_is_done)
        os.write(child_runs, b"1")
        os.read(until_parent_is_done, 1)
        os._exit(0)
    try:
        os.read(until_child_runs, 1)
        with pytest.raises(BlockingIOError):
            locked(tmp_path / "lock")
        opened.close()
        locked(tmp_path / "lock").close()
    finally:
        os.close(parent_is_done)
        os.waitpid(child, 0)
