"""Stops runs after a commit, as if they were killed, so that they leave their journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import token_recipe

from hf_awq_offload import quantize
from hf_awq_offload.offload.journal import Journal


class Stopped(BaseException):
    """Stands in for KeyboardInterrupt, which would stop the test runner."""


def stop_after(monkeypatch, commits: int, error: type[BaseException] = Stopped) -> None:
    """Stops the next run once it has committed this many layers."""
    commit = Journal.commit

    def stopping(self, index, *args, **kwargs):
        result = commit(self, index, *args, **kwargs)
        if index + 1 == commits:
            raise error
        return result

    monkeypatch.setattr(Journal, "commit", stopping)


def stopped_run(llama: Path, folder: Path, monkeypatch, commits: int, **recipe: Any) -> Path:
    """Stops a run and returns its journal; `recipe` changes fields of `token_recipe`."""
    with monkeypatch.context() as patched:
        stop_after(patched, commits)
        with pytest.raises(Stopped):
            quantize(llama, folder / "out", token_recipe(**recipe), checkpoint_dir=folder / "journal")
    assert not (folder / "out").exists()
    return folder / "journal"
