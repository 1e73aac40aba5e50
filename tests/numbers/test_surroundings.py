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

from hf_awq_offload import ConfigError, quantize
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
    """`save_pretrained` writes weights with safetensors, which may give them to the owner alone, as of any model."""
    source = save_model(tiny_llama(), tmp_path / "source")
    with umask(mask):
        recipe = token_recipe(n_grid=1, clip=False, rounding="nearest", report_dir=tmp_path / "report")
        quantize(source, tmp_path / "streamed", recipe)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=token_recipe(n_grid=0, clip=False))
        model.save_pretrained(tmp_path / "saved")
        save_model(tiny_llama(), tmp_path / "dense")
    weights = modes(tmp_path / "dense")["model.safetensors"]
    for name in ("streamed", "saved", "report"):
        for path, mode in modes(tmp_path / name).items():
            of_any_model = name == "saved" and path == "model.safetensors"
            most = 0o777 if (tmp_path / name / path).is_dir() else 0o666
            assert oct(mode) == oct(weights if of_any_model else most & ~mask), (name, path)


@pytest.mark.parametrize("mask", [0o077, 0o022], ids=oct)
def test_what_is_replaced_has_them_too(mask, tmp_path):
    source = save_model(tiny_llama(), tmp_path / "source")
    recipe = token_recipe(n_grid=1, clip=False, rounding="nearest")
    with umask(0o000):
        quantize(source, tmp_path / "out", recipe)
    with umask(mask):
        quantize(source, tmp_path / "out", recipe, overwrite=True)
    assert set(modes(tmp_path / "out").values()) == {0o777 & ~mask, 0o666 & ~mask}


def test_odd_names_of_folders_change_nothing(tmp_path):
    here = tmp_path / ODD_NAME
    here.mkdir()
    source = save_model(tiny_llama(), here / "source é")
    recipe = token_recipe(n_grid=1, clip=False, rounding="nearest")
    quantize(source, tmp_path / "plain", recipe)
    recipe.report_dir = here / "rapport ü"
    quantize(source, here / "ausgabe 模", recipe, checkpoint_dir=here / "journal é")
    weights = "model.safetensors"
    assert digests(here / "ausgabe 模")[weights] == digests(tmp_path / "plain")[weights]
    assert {path.name for path in here.iterdir()} == {"source é", "rapport ü", "ausgabe 模"}
    AutoModelForCausalLM.from_pretrained(here / "ausgabe 模")


@pytest.mark.parametrize("argument", ["src", "out_dir", "checkpoint_dir"])
def test_a_name_that_the_locale_cannot_tell_is_refused_with_the_remedy(argument, tmp_path):
    """This is what Python makes of the bytes of "modèle" where names are ASCII."""
    odd = tmp_path / b"mod\xc3\xa8le".decode("ascii", "surrogateescape")
    arguments = {"src": tmp_path / "source", "out_dir": tmp_path / "out", "checkpoint_dir": None} | {argument: odd}
    with pytest.raises(ConfigError, match=rf"{argument} is '.*mod\\udcc3\\udca8le'.* Set PYTHONUTF8=1"):
        quantize(config=token_recipe(), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plain_c_locale_gives_the_same_checkpoint_and_prints(tiny_llama_dir, tmp_path):
    """Python would otherwise take UTF-8 even in the C locale; here it has to read and print in ASCII."""
    plain = environment(LANG="C", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    arguments = ["quantize", tiny_llama_dir, "with a space", "--report-dir", "report", *FAST]
    printed = script("hf-awq-offload", *arguments, cwd=tmp_path, env=plain).stdout
    assert "quantized" in printed
    script("hf-awq-offload", "quantize", tiny_llama_dir, "usual", *FAST, cwd=tmp_path)
    ours, usual = digests(tmp_path / "with a space"), digests(tmp_path / "usual")
    assert ours["model.safetensors"] == usual["model.safetensors"]
    assert ours["config.json"] == usual["config.json"]
    document = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["created"])


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
