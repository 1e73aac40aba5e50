"""Models whose forward passes are paused resume after a kill, to the same bits, too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Run, commit_and_end, digests, run_to_the_end, steps_of
from shrink import text_ids, tiny_causal_lm

from hf_awq_offload import AwqOffloadConfig, quantize
from hf_awq_offload.calibration import paused_inputs
from hf_awq_offload.offload import journal
from hf_awq_offload.pipeline import loop

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODEL_TYPE = "gemma3n_text"
"""Its layers take per-layer inputs computed from the embeddings, and later layers reuse keys of earlier ones."""
LAYERS = 4
RECIPE: dict[str, Any] = {
    "dataset": text_ids(6, 20).tolist(),
    "n_samples": 6,
    "max_seq_len": 20,
    "batch_tokens": 40,
    "group_size": 32,
    "n_grid": 3,
}


class Stopped(BaseException):
    """Stands in for KeyboardInterrupt, which would stop the test runner."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_causal_lm(MODEL_TYPE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    built = []
    build = paused_inputs.PausedInputs.__init__

    def watched(self, *args, **kwargs):
        built.append(self)
        build(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paused_inputs.PausedInputs, "__init__", watched)
        target = tmp_path_factory.mktemp("undisturbed") / "out"
        quantize(source, target, AwqOffloadConfig(**RECIPE))
    assert len(built) == 1
    return digests(target)


def stopped_run(source: Path, folder: Path, monkeypatch, commits: int) -> None:
    commit = journal.Journal.commit

    def stopping(self, index, *args, **kwargs):
        result = commit(self, index, *args, **kwargs)
        if index + 1 == commits:
            raise Stopped
        return result

    with monkeypatch.context() as patched:
        patched.setattr(journal.Journal, "commit", stopping)
        with pytest.raises(Stopped):
            quantize(source, folder / "out", AwqOffloadConfig(**RECIPE), checkpoint_dir=folder / "journal")


def layers_quantized(monkeypatch) -> list[str]:
    names = []
    original = loop.quantize_with_statistics

    def watched(context, *args, **kwargs):
        names.append(int(context.name.rpartition(".")[2]))
        return original(context, *args, **kwargs)

    monkeypatch.setattr(loop, "quantize_with_statistics", watched)
    return names


@pytest.mark.parametrize("commits", range(1, LAYERS + 1))
def test_it_goes_on_after_its_last_layer_to_the_same_bits(commits, source, expected, tmp_path, monkeypatch):
    stopped_run(source, tmp_path, monkeypatch, commits)
    done = layers_quantized(monkeypatch)
    quantize(source, tmp_path / "out", AwqOffloadConfig(**RECIPE), checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == expected
    assert done == list(range(commits, LAYERS))
    assert not (tmp_path / "journal").exists()


def test_a_damaged_layer_is_quantized_again(source, expected, tmp_path, monkeypatch):
    stopped_run(source, tmp_path, monkeypatch, commits=3)
    file = tmp_path / "journal" / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = layers_quantized(monkeypatch)
    quantize(source, tmp_path / "out", AwqOffloadConfig(**RECIPE), checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == expected
    assert done == [1, 3]


def test_in_memory_it_goes_on_too(source, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def quantized() -> Any:
        recipe = AwqOffloadConfig(**RECIPE, checkpoint_dir=tmp_path / "journal")
        return AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe, dtype="auto")

    first = quantized().state_dict()
    (tmp_path / "journal" / "layer-00003.json").unlink()
    done = layers_quantized(monkeypatch)
    again = quantized().state_dict()
    assert done == [3]
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_killed_inside_a_commit_it_goes_on_to_the_same_bits(source, expected, tmp_path):
    steps = steps_of(Run(source, tmp_path / "counted" / "out", tmp_path / "counted-journal", RECIPE))
    assert digests(tmp_path / "counted" / "out") == expected
    for step in commit_and_end(steps, layer=1)[::6]:
        run = Run(source, tmp_path / "out", tmp_path / "journal", RECIPE)
        finished, _ = run_to_the_end(run, kill_at_step=step)
        assert not finished
        if not run.target.exists():
            assert run_to_the_end(run)[0]
        assert digests(run.target) == expected, f"killed at step {step}, {steps[step - 1]}"
        shutil.rmtree(run.target)
        shutil.rmtree(run.journal, ignore_errors=True)
