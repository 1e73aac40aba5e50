"""A stopped run resumes to the same bits; damage is found; the journal of another run is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Run, commit_and_end, digests, run_to_the_end, steps_of
from models import save_model, tiny_llama, token_batch, token_recipe
from stopped_runs import Stopped, stop_after, stopped_run
from torch import Tensor

from hf_awq_offload import JournalError, ModelStructureError, StorageError, quantize
from hf_awq_offload.checkpoint import durable
from hf_awq_offload.offload import durable_commit, journal
from hf_awq_offload.offload.hidden_states import HiddenStates, HiddenWriter
from hf_awq_offload.offload.journal import Journal
from hf_awq_offload.pipeline import loop

LAYERS = 5
PRINT = {"source": "a", "recipe": "b"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory) -> dict[str, str]:
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(llama, target, token_recipe())
    return digests(target)


def quantized_layers(monkeypatch) -> list[str]:
    """Records the names of layers as they are quantized."""
    names = []
    original = loop.quantize_with_statistics

    def watched(context, *args, **kwargs):
        names.append(context.name)
        return original(context, *args, **kwargs)

    monkeypatch.setattr(loop, "quantize_with_statistics", watched)
    return names


def go_on(llama: Path, folder: Path) -> dict[str, str]:
    quantize(llama, folder / "out", token_recipe(), checkpoint_dir=folder / "journal")
    assert not (folder / "journal").exists()
    return digests(folder / "out")


@pytest.mark.parametrize("commits", range(1, LAYERS + 1))
def test_a_stopped_run_goes_on_after_its_last_layer_to_the_same_bits(commits, llama, expected, tmp_path, monkeypatch):
    stopped_run(llama, tmp_path, monkeypatch, commits)
    done = quantized_layers(monkeypatch)
    assert go_on(llama, tmp_path) == expected
    assert done == [f"model.layers.{index}" for index in range(commits, LAYERS)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [damage, truncate, Path.unlink], ids=["altered", "truncated", "removed"])
@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("layer-00002.safetensors", [2, 3, 4]),
        ("layer-00002.json", [2, 3, 4]),
        ("hidden-00003.bin", [3, 4]),
        ("layer-00000.safetensors", [0, 3, 4]),
    ],
)
def test_damage_is_found_and_that_layer_quantized_again(file, again, harm, llama, expected, tmp_path, monkeypatch):
    folder = stopped_run(llama, tmp_path, monkeypatch, commits=3)
    harm(folder / file)
    done = quantized_layers(monkeypatch)
    assert go_on(llama, tmp_path) == expected
    assert done == [f"model.layers.{index}" for index in again]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SHA256 = r'\w+\.sha256 \("[0-9a-f]{64}" in the journal, "[0-9a-f]{64}" now\)'
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": (
        {"clip": False, "n_grid": 4},
        r"recipe\.n_grid \(3 in .*, 4 now\), recipe\.clip \(true in .*, false now\)",
    ),
    "data": ({"dataset": token_batch(6, 20, seed=9).tolist()}, SHA256.replace(r"\w+", "data")),
    "length": ({"max_seq_len": 10}, r"data\.tokens \(120 in the journal, 60 now\), data\.sha256 .*"),
    "source": ({}, SHA256.replace(r"\w+", "source")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_journal_of_another_run_is_refused_and_left_alone(what, llama, tmp_path, monkeypatch):
    folder = stopped_run(llama, tmp_path, monkeypatch, commits=2)
    before = contents(folder)
    changes, named = OTHERS[what]
    if what == "source":
        other = tiny_llama(num_hidden_layers=LAYERS)
        with torch.no_grad():
            other.model.layers[4].mlp.down_proj.weight[0, 0] += 1
        llama = save_model(other, tmp_path / "other")
    with pytest.raises(JournalError, match=f"another run: these differ: {named}\\. Nothing was changed"):
        quantize(llama, tmp_path / "out", token_recipe(**changes), checkpoint_dir=folder)
    assert contents(folder) == before


def test_a_folder_with_other_files_is_refused_and_left_alone(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(JournalError, match=r"holds other files \(thesis\.txt\)"):
        quantize(llama, tmp_path / "out", token_recipe(), checkpoint_dir=tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"mine"}


def test_two_runs_do_not_share_a_journal(tmp_path):
    first = Journal(tmp_path, PRINT)
    for _ in range(2):  # the first attempt does not erase who has it
        with pytest.raises(JournalError, match=rf"in use by process {os.getpid()} on \S+; wait .* Don't delete"):
            Journal(tmp_path, PRINT)
    first.close()
    Journal(tmp_path, PRINT).close()


def test_a_journal_in_use_is_not_discarded(tmp_path):
    first = Journal(tmp_path, PRINT)
    before = contents(tmp_path)
    journal.discard_if_empty(tmp_path)
    assert contents(tmp_path) == before
    first.close()
    journal.discard_if_empty(tmp_path)
    assert not tmp_path.exists()


def test_the_journal_of_another_release_says_only_so(tmp_path):
    Journal(tmp_path, PRINT | {"package": "0.1"}).close()
    with pytest.raises(JournalError, match=r'differ: package \("0.1" in the journal, "0.2" now\)\. Nothing'):
        Journal(tmp_path, {"source": {"tensors": 3}, "package": "0.2"})


def test_an_interrupted_run_says_where_it_goes_on(llama, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match="Interrupted with 2 layers finished") as caught:
        quantize(llama, tmp_path / "out", token_recipe(), checkpoint_dir=tmp_path / "journal")
    assert str(tmp_path / "journal") in str(caught.value)


def fail_at(monkeypatch, owner, name: str, call: int) -> None:
    """Makes the disk full from a certain call on."""
    calls = []
    original = getattr(owner, name)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(journal, "write_all"), (durable.os, "replace"), (durable.os, "fsync")],
    ids=lambda v: str(v)[-12:],
)
@pytest.mark.parametrize("call", [2, 4, 5])
def test_a_full_disk_is_a_clear_error_and_the_journal_stays_usable(
    owner, name, call, llama, expected, tmp_path, monkeypatch
):
    with monkeypatch.context() as full:
        fail_at(full, owner, name, call)
        with pytest.raises(StorageError, match=r"No space left on device.*make\s+room"):
            quantize(llama, tmp_path / "out", token_recipe(), checkpoint_dir=tmp_path / "journal")
    assert not (tmp_path / "out").exists()
    assert go_on(llama, tmp_path) == expected


def test_the_journal_does_not_grow_with_the_hidden_states(llama, tmp_path, monkeypatch):
    kept = []
    commit = Journal.commit

    def watched(self, *args, **kwargs):
        result = commit(self, *args, **kwargs)
        self.settle()
        kept.append(sorted(path.name for path in self.directory.glob("hidden-*")))
        return result

    monkeypatch.setattr(Journal, "commit", watched)
    quantize(llama, tmp_path / "out", token_recipe(), checkpoint_dir=tmp_path / "journal")
    assert kept[0] == ["hidden-00001.bin"]
    assert kept[2] == ["hidden-00002.bin", "hidden-00003.bin"]
    assert max(map(len, kept)) == 2


def test_smaller_batches_after_running_out_of_memory_are_remembered(llama, tmp_path, monkeypatch):
    """A run that halved its micro-batches ends the same when it is stopped and resumed."""
    limited = small_memory(monkeypatch, most_tokens=45)
    recipe = token_recipe(batch_tokens=120)
    quantize(llama, tmp_path / "reference" / "out", recipe)
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Stopped):
            quantize(llama, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    limited.clear()
    quantize(llama, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "out") == digests(tmp_path / "reference" / "out")
    assert max(limited) <= 45, "the size that did not fit was not tried again"


def small_memory(monkeypatch, most_tokens: int) -> list[int]:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward, tried = LlamaDecoderLayer.forward, []

    def limited(self, hidden_states, *args, **kwargs):
        tried.append(hidden_states.shape[0] * hidden_states.shape[1])
        if tried[-1] > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)
    return tried


# -- the parts -------------------------------------------------------------------------------------------------------


def written(file: Path | None, batches: list[Tensor]) -> HiddenStates:
    with closing(HiddenWriter(file)) as writer:
        for batch in batches:
            writer.append(batch)
        return writer.finish()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("where", ["RAM", "file"])
def test_hidden_states_come_back_and_can_be_regrouped(where, dtype, tmp_path):
    batches = [torch.randn(3, 8, 4).to(dtype), torch.randn(1, 8, 4).to(dtype), torch.randn(2, 5, 4).to(dtype)]
    states = written(tmp_path / "hidden.bin" if where == "file" else None, batches)
    assert all(map(torch.equal, states.batches, batches))
    again = states.regrouped([2, 2, 1, 1])
    assert again.shapes == [(2, 8, 4), (2, 8, 4), (1, 5, 4), (1, 5, 4)]
    flat = torch.cat([batch.flatten() for batch in again.batches])
    assert torch.equal(flat, torch.cat([batch.flatten() for batch in batches]))


def test_layers_that_return_several_dtypes_are_refused(tmp_path):
    with pytest.raises(ModelStructureError, match=r"bfloat16 for one batch and torch\.float32 .*Load the model in one"):
        written(tmp_path / "hidden.bin", [torch.ones(1, 2, 4), torch.ones(1, 2, 4, dtype=torch.bfloat16)])


def test_hidden_states_in_a_file_are_mapped_and_not_changed_through(tmp_path):
    states = written(tmp_path / "hidden.bin", [torch.ones(2, 3, 4)])
    states.batches[0].zero_()
    (tmp_path / "hidden.bin").rename(tmp_path / "renamed.bin")
    again = HiddenStates.from_file(tmp_path / "renamed.bin", [(2, 3, 4)], torch.float32)
    assert torch.equal(again.batches[0], torch.ones(2, 3, 4))


def test_a_commit_gives_back_tensors_and_report(tmp_path):
    with_weights = {"a.weight": torch.arange(6).view(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    first = Journal(tmp_path, PRINT)
    writer = first.hidden_writer(1)
    writer.append(torch.ones(1, 2, 3))
    first.commit(0, "layers.0", with_weights, 64, {"loss": 0.5}, writer)
    first.close()
    again = Journal(tmp_path, PRINT)
    commit = again.commits["layers.0"]
    assert (commit.index, commit.batch_tokens, commit.report) == (0, 64, {"loss": 0.5})
    tensors = commit.tensors()
    assert tensors.keys() == with_weights.keys()
    assert all(
        torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in with_weights.items()
    )
    hidden = again.hidden(1)
    assert hidden is not None
    assert torch.equal(hidden.batches[0], torch.ones(1, 2, 3))
    again.remove()
    assert not tmp_path.exists()


def test_a_header_that_can_not_be_read_is_an_error(tmp_path):
    Journal(tmp_path, PRINT).close()
    for text, what in (("{", "Expecting"), ("[1]", "no JSON object")):
        (tmp_path / "journal.json").write_text(text)
        with pytest.raises(JournalError, match=rf"can't be read \({what}.*delete the folder"):
            Journal(tmp_path, PRINT)
    (tmp_path / "journal.json").write_text(json.dumps({"format": "0", **PRINT}))
    with pytest.raises(JournalError, match="these differ: format"):
        Journal(tmp_path, PRINT)


@pytest.mark.slow
def test_killed_inside_a_commit_a_run_goes_on_to_the_same_bits(llama, expected, tmp_path):
    """Tests every seventh step; `tests/bench/kill.py` tests all of them, and random moments."""
    fields: Callable[[str], object] = lambda name: getattr(token_recipe(), name)  # noqa: E731
    recipe = {
        name: fields(name) for name in ("dataset", "n_samples", "max_seq_len", "batch_tokens", "group_size", "n_grid")
    }
    steps = steps_of(Run(llama, tmp_path / "counted" / "out", tmp_path / "counted-journal", recipe))
    assert digests(tmp_path / "counted" / "out") == expected
    for step in commit_and_end(steps, layer=1)[::7]:
        run = Run(llama, tmp_path / "out", tmp_path / "journal", recipe)
        finished, _ = run_to_the_end(run, kill_at_step=step)
        assert not finished
        if not run.target.exists():
            assert run_to_the_end(run)[0]
        assert digests(run.target) == expected, f"killed at step {step}, {steps[step - 1]}"
        shutil.rmtree(run.target)
        shutil.rmtree(run.journal, ignore_errors=True)


def test_what_no_run_resumes_from_is_neither_hashed_nor_flushed(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("flushed or hashed")

    for owner, name in ((durable.os, "fsync"), (journal, "file_digest"), (durable_commit, "file_digest")):
        monkeypatch.setattr(owner, name, refuse)
    with closing(Journal(tmp_path / "journal", PRINT, is_kept=False)) as made:
        hidden = made.hidden_writer(1)
        hidden.append(torch.ones(2, 3))
        commit = made.commit(0, "layer", {"a": torch.ones(4)}, 8, {"layer": {}, "left_out": {}}, hidden)
        assert torch.equal(commit.tensors()["a"], torch.ones(4))
        states = made.hidden(1)
        assert states is not None
        assert torch.equal(states.batches[0], torch.ones(2, 3))


def begun(folder: Path, name: str = "layers.0", index: int = 0) -> Journal:
    """Returns an open journal that was given a layer."""
    made = Journal(folder, PRINT)
    give(made, name, index)
    return made


def give(made: Journal, name: str, index: int) -> None:
    with closing(made.hidden_writer(index + 1)) as writer:
        writer.append(torch.full((1, 2, 3), float(index)))
        made.commit(index, name, {"a": torch.ones(4)}, 8, {}, writer)


class Gate:
    """Holds the journal's thread before it flushes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        original = durable_commit.flush_file

        def waiting(path: Path) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            original(path)

        monkeypatch.setattr(durable_commit, "flush_file", waiting)


def test_a_layer_counts_once_its_files_are_flushed_while_the_run_goes_on(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    made = begun(tmp_path / "journal")
    assert gate.reached.wait(60)
    assert torch.equal(made.commits["layers.0"].tensors()["a"], torch.ones(4)), "the run goes on meanwhile"
    assert made.hidden(1) is not None
    shutil.copytree(tmp_path / "journal", tmp_path / "killed")  # what a run that was killed now would leave
    gate.opened.set()
    made.close()
    (tmp_path / "killed" / "journal.lock").unlink()
    with closing(Journal(tmp_path / "killed", PRINT)) as killed:
        assert not killed.commits
    with closing(Journal(tmp_path / "journal", PRINT)) as again:
        assert list(again.commits) == ["layers.0"]
        assert again.hidden(1) is not None


def test_at_most_one_layer_is_on_its_way_and_all_come_in_order(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    made, given = begun(tmp_path), threading.Event()

    def give_the_next() -> None:
        for index in (1, 2):
            give(made, f"layers.{index}", index)
        given.set()

    other = threading.Thread(target=give_the_next)
    other.start()
    assert gate.reached.wait(60)
    assert not given.wait(0.2)
    gate.opened.set()
    other.join(60)
    made.settle()
    assert sorted(path.name for path in tmp_path.glob("*-*")) == [
        *(f"hidden-0000{index}.bin" for index in (2, 3)),
        *(f"layer-0000{index}.{kind}" for index in (0, 1, 2) for kind in ("json", "safetensors")),
    ]
    made.close()


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_the_folder_is_free_again_whatever_happens_while_a_journal_is_closed(error, tmp_path, monkeypatch):
    made = begun(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(made, "settle", lambda: (_ for _ in ()).throw(error))
        with suppress(KeyboardInterrupt):
            made.close()
    with closing(Journal(tmp_path, PRINT)) as again:
        assert list(again.commits) == ["layers.0"]


@pytest.mark.parametrize("when", ["with the next layer", "at the end", "when it is closed"])
def test_what_fails_behind_a_run_is_said(when, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as full:
        full.setattr(durable_commit, "flush_file", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        made = begun(tmp_path)
        if when == "with the next layer":
            with pytest.raises(StorageError, match="I/O error"):
                give(made, "layers.1", 1)
        elif when == "at the end":
            with pytest.raises(StorageError, match="I/O error"):
                made.settle()
        made.close()  # another error may be on its way: this one is said, not raised
    assert ("I/O error" in caplog.text) == (when == "when it is closed")
    with closing(Journal(tmp_path, PRINT)) as again:
        assert not again.commits
        give(again, "layers.0", 0)
    with closing(Journal(tmp_path, PRINT)) as again:
        assert list(again.commits) == ["layers.0"]
