"""A journal that was forged: whatever it says, nothing outside its folder is read, written or removed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_awq_offload import JournalError, StorageError
from hf_awq_offload.offload.hidden_states import HiddenWriter
from hf_awq_offload.offload.journal import Journal, require_unused

PRINT = {"source": "a"}
GROUP = {"consumers": ["q"], "producer": None, "alpha": None, "loss_nearest": 1.0, "loss": 0.5}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Makes a journal of two layers."""
    with closing(Journal(tmp_path / "journal", PRINT)) as made:
        for index in range(2):
            writer = made.hidden_writer(index + 1)
            writer.append(torch.ones(2, 3, 4))
            name = f"layers.{index}"
            report = {"layer": {"name": name, "groups": [GROUP], "seconds": 1.0}, "left_out": {}, "choices": "x"}
            made.commit(index, name, {f"{name}.q": torch.ones(2)}, 4, report, writer)
    return tmp_path / "journal"


def forge(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a commit and seals it again."""
    entry = json.loads(json.loads(file.read_text())["commit"])
    change(entry)
    text = json.dumps(entry)
    file.write_text(json.dumps({"commit": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def found(folder: Path) -> list[str]:
    with closing(Journal(folder, PRINT)) as journal:
        for index in range(4):
            journal.hidden(index)
        return sorted(journal.commits)


def test_the_journal_is_read(folder):
    assert found(folder) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("place", ["../mine.bin", "/etc/passwd", "hidden-00001.bin", ".."])
def test_hidden_states_of_another_name_are_neither_read_nor_removed(place, folder, tmp_path):
    mine = tmp_path / "mine.bin"
    mine.write_bytes(torch.ones(2, 3, 4).numpy().tobytes())
    forge(folder / "layer-00001.json", lambda entry: entry["hidden"].update(file=place))
    with closing(Journal(folder, PRINT)) as journal:
        assert sorted(journal.commits) == ["layers.0"]
        writer = HiddenWriter(folder / "hidden-00005.bin.partial")
        writer.append(torch.ones(1, 1, 1))
        journal.commit(4, "layers.4", {"q": torch.ones(1)}, 1, {}, writer)  # forgets earlier hidden states
    assert mine.exists()


@pytest.mark.parametrize("place", ["../mine.safetensors", "layer-00000.safetensors"])
def test_tensors_of_another_name_are_not_taken(place, folder, tmp_path):
    shutil.copyfile(folder / "layer-00001.safetensors", tmp_path / "mine.safetensors")
    forge(folder / "layer-00001.json", lambda entry: entry["tensors"].update(file=place))
    assert found(folder) == ["layers.0"]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "shapes larger than the file, which would be mapped": lambda e: e["hidden"].update(shapes=[[2**40, 3, 4]]),
    "a shape that is a text": lambda e: e["hidden"].update(shapes="abc"),
    "a negative size": lambda e: e["hidden"].update(shapes=[[-2, -3, 4]]),
    "a function of torch for a dtype": lambda e: e["hidden"].update(dtype="load"),
    "hidden states that are a list": lambda e: e.update(hidden=[1]),
    "no hidden states": lambda e: e.pop("hidden"),
    "another index": lambda e: e.update(index=7),
    "an index that is a text": lambda e: e.update(index="1"),
    "a name that is none": lambda e: e.update(name=["layers.1"]),
    "batches of nothing": lambda e: e.update(batch_tokens=None),
    "a report that is a list": lambda e: e.update(report=[]),
    "a report of another layer": lambda e: e["report"]["layer"].update(name="layers.0"),
    "groups that are numbers": lambda e: e["report"]["layer"].update(groups=[1]),
    "an unknown field": lambda e: e["report"]["layer"].update(evil=1),
    "no choices": lambda e: e["report"].update(choices=None),
    "deep brackets": lambda e: e.update(name=json.loads("[" * 80 + "]" * 80)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_forged_commit_is_left_out_and_the_layer_quantized_again(what, folder, caplog):
    forge(folder / "layer-00001.json", CHANGES[what])
    assert found(folder) == ["layers.0"]
    assert "layer-00001.json can't be read" in caplog.text


NO_COMMITS = ["[" * 50_000, "[]", '{"commit": 3}', '{"commit": "{}", "sha256": 5}', "\xff"]


@pytest.mark.parametrize("text", NO_COMMITS, ids=range(5))
def test_a_commit_that_is_none_is_left_out(text, folder):
    (folder / "layer-00001.json").write_text(text, encoding="latin-1")
    assert found(folder) == ["layers.0"]


def test_a_header_of_deep_brackets_is_an_error_of_ours(folder):
    (folder / "journal.json").write_text('{"a":' * 50_000)
    with pytest.raises(JournalError, match="deep"):
        found(folder)


def test_a_link_in_the_place_of_the_lock_is_not_written_through(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (folder / "journal.lock").unlink()
    (folder / "journal.lock").symlink_to(mine)
    with pytest.raises(StorageError, match="journal"):
        Journal(folder, PRINT)
    with pytest.raises(StorageError, match="journal"):
        require_unused(folder)
    assert mine.read_text() == "mine"


def test_pipes_in_the_place_of_files_are_not_waited_for(folder):
    (folder / "layer-00001.json").unlink()
    os.mkfifo(folder / "layer-00001.json")
    assert found(folder) == ["layers.0"]
    (folder / "journal.json").unlink()
    os.mkfifo(folder / "journal.json")
    with pytest.raises(JournalError, match="not a regular file"):
        found(folder)


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(folder):
    (folder / "journal.lock").unlink()
    os.mkfifo(folder / "journal.lock")
    with pytest.raises(StorageError, match="regular file"):
        Journal(folder, PRINT)


@pytest.mark.parametrize("name", ["layer-00002.safetensors", "layer-00002.json", "hidden-00003.bin"])
def test_a_link_in_the_place_of_a_partial_file_is_not_written_through(name, folder, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (folder / f"{name}.partial").symlink_to(mine)
    with closing(Journal(folder, PRINT)) as journal:
        writer = journal.hidden_writer(3)
        writer.append(torch.ones(1, 1, 1))
        journal.commit(2, "layers.2", {"q": torch.ones(1)}, 1, {}, writer)
    assert mine.read_text() == "mine"
    assert not (folder / name).is_symlink()


def test_files_of_the_journal_that_are_links_are_not_taken(folder, tmp_path):
    shutil.move(folder / "layer-00001.safetensors", tmp_path / "elsewhere")
    (folder / "layer-00001.safetensors").symlink_to(tmp_path / "elsewhere")
    assert found(folder) == ["layers.0"]
