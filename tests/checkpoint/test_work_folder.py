"""A new checkpoint takes its place all at once, and what was there is lost only to a complete one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_awq_offload import ConfigError, StorageError
from hf_awq_offload.checkpoint.output_folder import output_folder
from hf_awq_offload.checkpoint.work_folder import REPLACED_NAME, move_into_place, work_folder


def folder_with(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "config.json").read_text()


def test_a_folder_makes_room_for_a_complete_checkpoint(tmp_path):
    target = folder_with(tmp_path / "out", "old")
    with work_folder(target) as work:
        move_into_place(folder_with(work / "assembled", "new"), target, work)
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_what_was_there_is_back_when_its_successor_can_not_be_moved(tmp_path):
    target = folder_with(tmp_path / "out", "old")
    with work_folder(target) as work, pytest.raises(StorageError, match=r"can't be moved to .*out"):
        move_into_place(work / "not there", target, work)
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_files_of_others_are_back_too_and_nothing_is_left_beside_them(tmp_path):
    target = folder_with(tmp_path / "out", "old")
    (target / "thesis.tex").write_text("mine")
    with work_folder(target) as work, pytest.raises(StorageError, match=r"can't be moved to .*out"):
        move_into_place(work / "not there", target, work)
    assert (target / "thesis.tex").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


def test_what_can_not_be_moved_back_at_once_is_kept_for_the_next_run(tmp_path, monkeypatch):
    target = folder_with(tmp_path / "out", "old")
    replace = os.replace

    def once_only(source: Path, destination: Path) -> None:
        if destination == target:
            raise OSError("no")
        replace(source, destination)

    with work_folder(target) as work:
        monkeypatch.setattr(os, "replace", once_only)
        with pytest.raises(StorageError, match="no"):
            move_into_place(folder_with(work / "assembled", "new"), target, work)
    assert content(work / REPLACED_NAME) == "old"
    monkeypatch.undo()
    with work_folder(target):
        assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_neither_replaced_nor_moved_aside(tmp_path):
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(ConfigError, match=r"output_dir .*out is a file; name a folder"):
        output_folder(target, overwrite=True, field="output_dir")
    with pytest.raises(StorageError, match="can't be moved"):
        move_into_place(folder_with(tmp_path / "work" / "assembled", "new"), target, tmp_path / "work")
    assert target.read_text() == "mine"


def test_what_appeared_during_the_run_is_kept_beside_the_new_checkpoint(tmp_path, caplog):
    target = folder_with(tmp_path / "out", "old")
    with work_folder(target) as work:
        (target / "thesis.tex").write_text("mine")
        move_into_place(folder_with(work / "assembled", "new"), target, work)
    assert content(target) == "new"
    (kept,) = tmp_path.glob("out.replaced-*/out")
    assert (kept / "thesis.tex").read_text() == "mine"
    assert str(kept) in caplog.text
