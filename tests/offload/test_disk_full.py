"""On a full disk (a tmpfs of a few MiB), errors are clear, nothing is lost, and a resumed run has the same bits."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import digests
from models import save_model, tiny_llama, token_batch, token_recipe

from hf_awq_offload import MemoryLimitError, StorageError, plan, quantize
from hf_awq_offload.integrations import assembly
from hf_awq_offload.offload import journal
from hf_awq_offload.offload.hidden_states import HiddenWriter

LAYERS = 5
SIZE_MIB = 16


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tiny_llama(num_hidden_layers=LAYERS), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(llama, tmp_path_factory) -> dict[str, str]:
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(llama, target, recipe())
    return digests(target)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mounts a small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root; test_journal.py has full disks that are pretended")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def recipe():
    """Returns a recipe whose hidden states take 640 KiB, more than a writer's buffer."""
    return token_recipe(dataset=token_batch(125, 20).tolist(), n_samples=125)


def fill(folder: Path) -> Path:
    """Fills the disk."""
    filler = folder / "filler"
    with filler.open("wb") as opened:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        os.posix_fallocate(opened.fileno(), 0, free)
    return filler


def filled_at(monkeypatch, owner: object, name: str, call: int, folder: Path) -> None:
    """Fills the disk just before a certain call."""
    calls = []
    original = getattr(owner, name)

    def filling(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            fill(folder)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, filling)


AT = {
    "before the first layer's hidden states": (HiddenWriter, "append", 1),
    "within hidden states": (HiddenWriter, "append", 40),
    "before a layer's tensors": (journal, "write_all", 3),
    "after a layer": (journal.Journal, "commit", 4),
    "before the checkpoint": (assembly, "write_shards", 1),
    "before the card": (assembly, "complete", 1),
}
"""The calls before which the disk becomes full."""


@pytest.mark.parametrize("whose", ["journal", "output", "both"])
@pytest.mark.parametrize("when", AT)
def test_once_there_is_room_the_same_call_ends_with_the_same_bits(
    when, whose, disk, llama, expected, tmp_path, monkeypatch
):
    target = (tmp_path if whose == "journal" else disk) / "out"
    checkpoint_dir = (tmp_path if whose == "output" else disk) / "journal"
    survives = whose == "journal" and when.startswith("before the c")  # nothing is written there any more
    with monkeypatch.context() as full:
        filled_at(full, *AT[when], folder=disk)
        if survives:
            quantize(llama, target, recipe(), checkpoint_dir=checkpoint_dir)
        else:
            with pytest.raises(StorageError, match=r"No space left on device.*[Mm]ake room"):
                quantize(llama, target, recipe(), checkpoint_dir=checkpoint_dir)
            assert not target.exists()
            assert not target.with_name(".out.work").exists()
    (disk / "filler").unlink()
    if not survives:
        quantize(llama, target, recipe(), checkpoint_dir=checkpoint_dir)
    assert digests(target) == expected
    assert not checkpoint_dir.exists()
    assert not target.with_name(".out.work").exists()


def test_without_a_journal_a_full_disk_leaves_nothing(disk, llama, monkeypatch):
    with monkeypatch.context() as full:
        filled_at(full, *AT["within hidden states"], folder=disk)
        with pytest.raises(StorageError, match="No space left on device"):
            quantize(llama, disk / "out", recipe())
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_what_can_not_fit_is_refused_beforehand(disk, llama):
    fill(disk)
    with pytest.raises(MemoryLimitError, match=r"of disk space.*make room"):
        quantize(llama, disk / "out", recipe())
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_run_that_goes_on_needs_room_for_the_rest_only(disk, llama, expected, monkeypatch):
    with monkeypatch.context() as full:
        filled_at(full, *AT["before the checkpoint"], folder=disk)
        with pytest.raises(StorageError):
            quantize(llama, disk / "out", recipe(), checkpoint_dir=disk / "journal")
    kept = recipe()
    kept.checkpoint_dir = str(disk / "journal")
    planned = plan(llama, kept, probe=False).disk_bytes
    there = sum(path.stat().st_size for path in (disk / "journal").iterdir())
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - int(planned - 0.9 * there))
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize < planned
    quantize(llama, disk / "out", recipe(), checkpoint_dir=disk / "journal")
    assert digests(disk / "out") == expected
