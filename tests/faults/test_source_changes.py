"""A source that changes while a run goes on never ends up, half old and half new, in a checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import digests
from models import save_model, tiny_llama, token_recipe
from stopped_runs import stopped_run
from tiny_tokenizer import TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

from hf_awq_offload import AwqOffloadError, CheckpointError, JournalError, quantize, streamed
from hf_awq_offload.checkpoint import conversion
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.integrations.quantizer import AwqOffloadQuantizer
from hf_awq_offload.offload.journal import Journal

WEIGHTS = "model.safetensors"
FAST = {"n_grid": 1, "clip": False, "rounding": "nearest"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = save_model(tiny_llama(vocab_size=300, num_hidden_layers=3), tmp_path_factory.mktemp("pristine") / "llama")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory) -> Path:
    """The weights of a model of the same shapes."""
    folder = tmp_path_factory.mktemp("other")
    return save_model(tiny_llama(vocab_size=300, num_hidden_layers=3, seed=1), folder) / WEIGHTS


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "source")


def recipe(**changes):
    return token_recipe(dataset=TEXTS, **FAST, **changes)


def once_before(monkeypatch, owner: object, name: str, call: int, change: Callable[[], object]) -> None:
    """Makes a change just before a certain call."""
    original, calls = getattr(owner, name), []

    def changing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            change()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, changing)


def rewrite(file: Path) -> None:
    """Changes bytes in place, as another tool might."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace(file: Path, other: Path) -> None:
    """Puts another file in its place by a rename, with the same size and time."""
    status = file.stat()
    shutil.copy(other, file.with_name("new"))
    os.utime(file.with_name("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(file.with_name("new"), file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


CHANGES = {"rewritten": rewrite, "shrunk": shrink, "gone": Path.unlink}
MOMENTS = {
    "once its headers were read": (AwqOffloadQuantizer, "prepare", 1),
    "between two layers": (Journal, "commit", 1),
    "when all layers are done": (streamed, "assemble", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_an_error_that_names_the_file(change, moment, source, tmp_path, monkeypatch):
    file = source / WEIGHTS
    owner, name, call = MOMENTS[moment]
    once_before(monkeypatch, owner, name, call, lambda: CHANGES[change](file))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} (was changed|can't be read)") as caught:
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert str(file) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) in (["journal", "source"], ["source"])


def test_put_back_the_run_goes_on_to_the_same_bits(source, pristine, tmp_path, monkeypatch):
    quantize(source, tmp_path / "expected", recipe())
    with monkeypatch.context() as changing:
        once_before(changing, Journal, "commit", 2, lambda: rewrite(source / WEIGHTS))
        with pytest.raises(CheckpointError, match=r"was changed.*Put the file back as it was and repeat the call"):
            quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    with pytest.raises(JournalError, match=r"another run: these differ: source\.sha256"):
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    shutil.copy(pristine / WEIGHTS, source / WEIGHTS)
    quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_a_file_of_the_same_size_and_time_in_its_place_is_noticed(source, other_weights, tmp_path, monkeypatch):
    once_before(monkeypatch, Journal, "commit", 2, lambda: replace(source / WEIGHTS, other_weights))
    with pytest.raises(CheckpointError, match=r"were replaced while they were in use.*is not written"):
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert not (tmp_path / "out").exists()


def test_a_journal_is_not_resumed_with_other_weights(source, other_weights, tmp_path, monkeypatch):
    journal = stopped_run(source, tmp_path, monkeypatch, 2, dataset=TEXTS, **FAST)
    before = digests(journal)
    shutil.copy(other_weights, source / WEIGHTS)
    with pytest.raises(JournalError, match=r"source\.sha256"):
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=journal)
    assert digests(journal) == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_changes_is_not_mixed_with_the_old_weights(change, source, tmp_path, monkeypatch):
    file = source / "tokenizer.json"
    once_before(monkeypatch, Journal, "commit", 1, lambda: CHANGES[change](file))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was changed while it was in use"):
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_vanishes_during_the_copy_is_named(source, tmp_path, monkeypatch):
    once_before(monkeypatch, shutil, "copyfile", 1, (source / "tokenizer.json").unlink)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was changed .*not to be read \(No such file"):
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_come_along_may_change(source, tmp_path, monkeypatch):
    (source / "train.log").write_text("step 1")
    (source / "README.md").write_text("# Mine")

    def write() -> None:
        for name in ("train.log", "README.md"):
            (source / name).write_text("more")

    once_before(monkeypatch, Journal, "commit", 1, write)
    quantize(source, tmp_path / "out", recipe(report_dir=source / "report"), checkpoint_dir=source / "journal")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("change", ["rewritten", "gone"])
def test_a_change_while_transformers_loads_is_noticed(change, source, monkeypatch):
    method = "_process_model_after_weight_loading"
    once_before(monkeypatch, AwqOffloadQuantizer, method, 1, lambda: CHANGES[change](source / WEIGHTS))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} was changed while it was in use"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe(offload="cpu"))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_changes_while_it_is_converted(change, name, source, tmp_path, monkeypatch):
    quantized = tmp_path / "quantized"
    quantize(source, quantized, recipe())
    once_before(monkeypatch, conversion, "copy_all_companions", 1, lambda: CHANGES[change](quantized / name))
    with pytest.raises(AwqOffloadError, match=rf"{name} was changed while it was in use"):
        convert_checkpoint(quantized, tmp_path / "out", "gemv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", "source"]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_file_that_is_touched_or_copied_again_is_the_same_file(name, source, tmp_path, monkeypatch):
    def copy_again() -> None:
        shutil.copyfile(source / name, tmp_path / "again")
        os.replace(tmp_path / "again", source / name)

    quantize(source, tmp_path / "expected", recipe())
    once_before(monkeypatch, Journal, "commit", 1, copy_again)
    quantize(source, tmp_path / "out", recipe())
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
