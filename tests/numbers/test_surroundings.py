"""What surrounds a run does not change or break it: locale, names of folders, umask, a clock that is set back."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import FAST, environment, script
from killing import digests
from models import save_model, tiny_llama, token_recipe
from transformers import AutoModelForCausalLM

from hf_awq_offload import quantize
from hf_awq_offload.reporting.progress import Progress

ODD_NAME = "modèle 模型 ü\nnext line"
"""A folder's name with letters that are not ASCII, spaces and a line break."""


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Returns the permissions of a folder and of all in it, by name."""
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o000], ids=oct)
def test_what_is_written_has_the_permissions_that_the_umask_says(mask, tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    with umask(mask):
        recipe = token_recipe(n_grid=1, clip=False, rounding="nearest", report_dir=tmp_path / "report")
        quantize(source, tmp_path / "streamed", recipe)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe(n_grid=0, clip=False))
        model.save_pretrained(tmp_path / "saved")
    for name in ("streamed", "saved", "report"):
        for path, mode in modes(tmp_path / name).items():
            is_folder = (tmp_path / name / path).is_dir()
            assert oct(mode) == oct((0o777 if is_folder else 0o666) & ~mask), (name, path)


@pytest.mark.parametrize("mask", [0o077, 0o022], ids=oct)
def test_what_is_replaced_has_them_too(mask, tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    recipe = token_recipe(n_grid=1, clip=False, rounding="nearest")
    with umask(0o000):
        quantize(source, tmp_path / "out", recipe)
    with umask(mask):
        quantize(source, tmp_path / "out", recipe, overwrite=True)
    assert set(modes(tmp_path / "out").values()) == {0o777 & ~mask, 0o666 & ~mask}


@pytest.mark.slow
def test_a_plain_c_locale_and_odd_names_of_folders(tiny_llama_dir, tmp_path):
    """Python would otherwise take UTF-8 even in the C locale; here it has to read and print in ASCII."""
    here = tmp_path / ODD_NAME
    (here / "source").mkdir(parents=True)
    for file in tiny_llama_dir.iterdir():
        (here / "source" / file.name).write_bytes(file.read_bytes())
    plain = environment(LANG="C", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    out, report = here / "ausgabe é", here / "rapport"
    arguments = ["quantize", here / "source", out, "--report-dir", report, *FAST]
    printed = script("hf-awq-offload", *arguments, cwd=tmp_path, env=plain).stdout
    assert "quantized" in printed
    assert not [path for path in here.iterdir() if path.name not in {"source", out.name, "rapport"}]
    script("hf-awq-offload", "quantize", tiny_llama_dir, "plain", *FAST, cwd=tmp_path)
    ours, usual = digests(out), digests(tmp_path / "plain")
    assert {name: ours[name] for name in ours if name != "README.md"} == {
        name: usual[name] for name in usual if name != "README.md"
    }
    document = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["created"])
    inspected = script("hf-awq-offload", "inspect", out, "--json", cwd=tmp_path, env=plain).stdout
    assert json.loads(inspected)["command"] == "inspect"


def test_a_clock_that_is_set_back_changes_no_result(tmp_path, monkeypatch):
    """Durations come from a clock that only goes forward; journals and locks go by content, not by dates."""
    source = save_model(tiny_llama(), tmp_path / "source")
    recipe = token_recipe(n_grid=1, clip=False, rounding="nearest")
    quantize(source, tmp_path / "usual", recipe)
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    report = quantize(source, tmp_path / "back", recipe, checkpoint_dir=tmp_path / "journal")
    assert digests(tmp_path / "back") == digests(tmp_path / "usual")
    seconds = [layer.seconds for layer in report.layers] + list(report.phase_seconds.values())
    assert all(0 <= value < 3600 for value in seconds)


def test_a_journal_from_the_future_is_resumed(tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    recipe = token_recipe(n_grid=1, clip=False, rounding="nearest")
    quantize(source, tmp_path / "whole", recipe)

    class Stop(Exception):
        pass

    def stop(self: Progress, report: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "finished", stop)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    for path in (tmp_path / "journal").iterdir():
        os.utime(path, (4_000_000_000, 4_000_000_000))
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "adopted", lambda self, name: shown.append(name))
        quantize(source, tmp_path / "out", recipe, checkpoint_dir=tmp_path / "journal")
    assert shown == ["model.layers.0"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
