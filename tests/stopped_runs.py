"""Runs that stop after a commit, as if killed, and leave their journal."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import token_recipe

from hf_awq_offload import quantize
from hf_awq_offload.offload.journal import Journal


class Stopped(BaseException):
    """In the place of Ctrl-C: the test runner wants that one."""


def stop_after(monkeypatch, commits: int, error: type[BaseException] = Stopped) -> None:
    """The next run is stopped when it has committed so many layers."""
    commit = Journal.commit

    def stopping(self, index, *args, **kwargs):
        result = commit(self, index, *args, **kwargs)
        if index + 1 == commits:
            raise error
        return result

    monkeypatch.setattr(Journal, "commit", stopping)


def stopped_run(llama: Path, folder: Path, monkeypatch, commits: int) -> Path:
    """The journal of a run that was stopped."""
    with monkeypatch.context() as patched:
        stop_after(patched, commits)
        with pytest.raises(Stopped):
            quantize(llama, folder / "out", token_recipe(), checkpoint_dir=folder / "journal")
    assert not (folder / "out").exists()
    return folder / "journal"
