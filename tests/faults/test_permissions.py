"""Files and folders that may not be read or written are named before any layer is quantized.

Root may do everything: as root, the tests give up the capabilities that let it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from models import save_model, tiny_llama, token_recipe
from tiny_tokenizer import TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM

from hf_awq_offload import AwqOffloadError, StorageError, quantize
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.pipeline import loop

OVERRIDE_AND_SEARCH = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def as_anyone() -> Iterator[None]:
    """Has permissions bind this thread, and those that it starts, as they bind users other than root."""
    library = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(VERSION_3, 0), (_Sets * 2)()
    assert library.capget(ctypes.byref(header), sets) == 0
    kept = sets[0].effective
    sets[0].effective &= ~OVERRIDE_AND_SEARCH
    assert library.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = kept
        assert library.capset(ctypes.byref(header), sets) == 0


@contextmanager
def with_mode(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with as_anyone():
            yield
    finally:
        path.chmod(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = save_model(tiny_llama(vocab_size=300), tmp_path_factory.mktemp("llama"))
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(llama, tmp_path) -> Path:
    return shutil.copytree(llama, tmp_path / "source")


@pytest.fixture
def no_layer(monkeypatch) -> None:
    """Fails a test in which a layer is quantized."""

    def refuse(context, *args, **kwargs):
        raise AssertionError(f"{context.name} is quantized")

    monkeypatch.setattr(loop, "quantize_with_statistics", refuse)


def recipe(**changes):
    return token_recipe(dataset=TEXTS, n_grid=1, **changes)


def test_permissions_do_bind(tmp_path):
    (tmp_path / "file").write_text("")
    with with_mode(tmp_path / "file", 0), pytest.raises(PermissionError):
        (tmp_path / "file").read_text()


@pytest.mark.usefixtures("no_layer")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_file_that_can_not_be_read(name, source, tmp_path):
    for run in (
        lambda: quantize(source, tmp_path / "out", recipe()),
        lambda: AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe()),
    ):
        with (
            with_mode(source / name, 0),
            pytest.raises(AwqOffloadError, match=r"Permission denied|can't be read") as caught,
        ):
            run()
        assert name in str(caught.value) or "tokenizer" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("no_layer")
def test_a_source_folder_that_can_not_be_entered(source, tmp_path):
    with with_mode(source, 0), pytest.raises(AwqOffloadError, match=str(source)):
        quantize(source, tmp_path / "out", recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("no_layer")
@pytest.mark.parametrize("what", ["out", "journal", "report"])
def test_a_folder_that_can_not_be_written_to(what, source, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    places = {name: tmp_path / name for name in ("out", "journal", "report")} | {what: closed / what}
    with with_mode(closed, 0o555), pytest.raises(StorageError, match=rf"{closed}.*[Cc]orrect (the .*|its )permissions"):
        quantize(source, places["out"], recipe(report_dir=places["report"]), checkpoint_dir=places["journal"])
    assert list(closed.iterdir()) == []
    left = {path.name for path in tmp_path.iterdir()} - {"closed", "source"}
    assert left <= {"report"}, "the report's folder is made beforehand"


@pytest.mark.usefixtures("no_layer")
def test_a_journal_that_can_not_be_written_to(source, tmp_path):
    (tmp_path / "journal").mkdir()
    with (
        with_mode(tmp_path / "journal", 0o555),
        pytest.raises(StorageError, match=r"journal.*correct the folder's perm"),
    ):
        quantize(source, tmp_path / "out", recipe(), checkpoint_dir=tmp_path / "journal")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "source"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_checkpoint_to_convert_that_can_not_be_read(name, source, tmp_path):
    quantize(source, tmp_path / "quantized", recipe())
    with (
        with_mode(tmp_path / "quantized" / name, 0),
        pytest.raises(AwqOffloadError, match=rf"{name} can't be read: Permission denied"),
    ):
        convert_checkpoint(tmp_path / "quantized", tmp_path / "out", "gemv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quantized", "source"]


def test_saving_into_a_folder_that_can_not_be_written_to(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=recipe())
    (tmp_path / "out").mkdir()
    with (
        with_mode(tmp_path / "out", 0o555),
        pytest.raises(StorageError, match=rf"can't be saved to {tmp_path / 'out'}"),
    ):
        model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert os.path.isfile(tmp_path / "out" / "model.safetensors")
