"""Progress is a bar where it can be redrawn, a line per layer elsewhere, and nothing where it is switched off."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from models import save_model, tiny_llama, token_recipe
from stopped_runs import Stopped, stop_after
from transformers.utils import logging

from hf_awq_offload import plan, quantize, quantize_model
from hf_awq_offload.report import GroupReport, LayerReport, MemoryUse
from hf_awq_offload.reporting.progress import Progress, announce, can_redraw

LAYER = LayerReport(
    "model.layers.0",
    (GroupReport(("q_proj",), "norm", 0.5, 0.0123, 0.0045),),
    4.9,
    phase_seconds={"onload": 0.2, "search": 3.04},
    memory=MemoryUse(ram=2**30, ram_peak=3 * 2**30),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def stderr(stream: Any) -> Iterator[Any]:
    """Replaces stderr; not a fixture, because pytest puts its own stream in place between a fixture and the test."""
    own, sys.stderr = sys.stderr, stream
    try:
        yield stream
    finally:
        sys.stderr = own


def own_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("[")]


def test_a_log_file_gets_a_line_per_layer_and_no_carriage_return(capsys):
    with Progress() as progress:
        progress.expect(3)
        progress.phase("onload", "model.layers.0")
        progress.finished(LAYER)
        progress.phase("forward", "model.layers.1")
        progress.adopted("model.layers.1")
        progress.finished(LAYER)
    log = capsys.readouterr().err
    first, second, third = log.splitlines()
    assert first == (
        "[1/3] model.layers.0: loss 0.0123 → 0.0045, onload 0.2 s, search 3.0 s, 0.0 s in all, peak 3.00 GiB, ETA 00:00"
    )
    assert second == "[2/3] model.layers.1: quantized by an earlier run, ETA 00:00"
    assert third.startswith("[3/3] model.layers.0: ")
    assert "ETA" not in third
    assert "\r" not in log


def test_a_layer_of_which_nothing_is_to_say_is_named_alone(capsys):
    with Progress() as progress:
        progress.expect(1)
        progress.passed("model.layers.0", [])
    assert capsys.readouterr().err == "[1/1] model.layers.0\n"


def test_the_time_to_come_is_that_of_layers_after_the_first(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 100.0, 100.0, 110.0, 110.0, 110.0])
    monkeypatch.setattr("hf_awq_offload.reporting.progress.time.perf_counter", lambda: next(clock))
    with Progress() as progress:
        progress.expect(32)
        progress.finished(LAYER)
        progress.finished(LAYER)
    first, second = capsys.readouterr().err.splitlines()
    assert "100.0 s in all" in first
    assert first.endswith("ETA 51:40")  # 31 times 100 s, since no other layer is known yet
    assert second.endswith("ETA 05:00")


def test_a_terminal_shows_layer_phase_loss_memory_and_time_to_come(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with stderr(Terminal()) as terminal, Progress() as progress:
        progress.expect(3)
        progress.finished(LAYER)
        progress.phase("search", "model.layers.1")
    shown = terminal.getvalue().split("\r")[-1]
    assert "Quantizing:  33%|" in shown
    assert "| 1/3 [00:00, ETA 00:00, model.layers.1 search, loss 0.0123 → 0.0045, peak 3.00 GiB]" in shown


@pytest.mark.parametrize(
    ("columns", "end"),
    [
        (40, "| 1/80 [00:00]"),
        (60, "| 1/80 [00:00, ETA 00:00]"),
        (80, "| 1/80 [00:00, ETA 00:00, layers.1 structure]"),
        (120, "| 1/80 [00:00, ETA 00:00, model.layers.1 structure, loss 0.0123 → 0.0045, peak 3.00 GiB]"),
    ],
)
def test_a_bar_shows_what_fits_the_terminal_and_cuts_nothing(columns, end, monkeypatch):
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (columns, 20))
    with stderr(Terminal()) as terminal, Progress() as progress:
        progress.expect(80)
        progress.finished(LAYER)
        progress.phase("structure", "model.layers.1")
    lines = terminal.getvalue().replace("\n", "\r").split("\r")
    assert max(map(len, lines)) <= columns
    shown = next(line for line in reversed(lines) if "%" in line)
    assert shown.startswith("Quantizing:   1%|")
    assert shown.endswith(end)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("switch", ["disable_progress_bar", "set_verbosity_error"])
def test_transformers_switches_are_obeyed(switch, stream):
    verbosity = logging.get_verbosity()
    getattr(logging, switch)()
    try:
        with stderr(stream()) as shown, Progress() as progress:
            progress.expect(1)
            progress.phase("onload", "model.layers.0")
            progress.finished(LAYER)
            announce("Planned: much.")
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    assert shown.getvalue() == ""


@pytest.mark.parametrize(("lines", "columns"), [(24, 0), (0, 120)])
def test_a_terminal_without_room_gets_lines(lines, columns):
    """A container's terminal may have no size; tqdm draws nothing there."""
    main, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    with open(side, "w", encoding="utf-8") as terminal, stderr(terminal), Progress() as progress:
        progress.expect(1)
        progress.finished(LAYER)
        assert os.read(main, 1000).startswith(b"[1/1] model.layers.0: loss 0.0123")
    os.close(main)


def test_a_notebook_can_redraw(monkeypatch):
    assert not can_redraw()
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert can_redraw()
    shell.config = {"TerminalIPythonApp": {}}
    assert not can_redraw()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not can_redraw()


def test_a_run_without_data_has_no_losses_to_show(capsys):
    quantize_model(tiny_llama(), token_recipe(n_grid=0, clip=False, rounding="nearest"))
    first, second = own_lines(log := capsys.readouterr().err)
    assert first.startswith("[1/2] model.layers.0: onload 0.0 s, search ")
    assert second.startswith("[2/2] model.layers.1: ")
    assert "loss" not in log


def test_a_run_says_what_is_planned_and_then_every_layer(capsys, tmp_path, monkeypatch):
    source = save_model(tiny_llama(num_hidden_layers=3), tmp_path / "llama")
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Stopped):
            quantize(source, tmp_path / "out", token_recipe(), checkpoint_dir=tmp_path / "journal")
    log = capsys.readouterr().err
    assert log.count("\nPlanned: 3 layers on cpu") == 1
    assert [line.split(":")[0] for line in own_lines(log)] == ["[1/3] model.layers.0"]  # the second was cut off
    quantize(source, tmp_path / "out", token_recipe(), checkpoint_dir=tmp_path / "journal")
    again = own_lines(capsys.readouterr().err)
    assert again[0] == "[1/3] model.layers.0: quantized by an earlier run"
    assert again[2].startswith("[3/3] model.layers.2: loss ")


def test_a_plan_shows_the_layers_that_it_tries(capsys, tmp_path):
    plan(save_model(tiny_llama(num_hidden_layers=3), tmp_path / "llama"), token_recipe())
    assert [line.split(":")[0] for line in own_lines(capsys.readouterr().err)] == [
        "[1/2] model.layers.0",
        "[2/2] model.layers.1",
    ]
