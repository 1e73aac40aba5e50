"""What a new user meets first: a name that is nowhere, a plan, and a run whose output is its own."""

from __future__ import annotations

import argparse
import logging

import huggingface_hub
import pytest
from command_line import FAST
from huggingface_hub import constants

from hf_awq_offload.cli.demo import Row, next_steps, table
from hf_awq_offload.cli.main import main
from hf_awq_offload.cli.verbosity import spoken_as_asked
from hf_awq_offload.logs import get_logger
from hf_awq_offload.reporting.evaluation import Evaluation


@pytest.fixture
def hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("hub_out_of_reach")
@pytest.mark.parametrize("line", [["quantize", "lama", "out"], ["inspect", "lama"], ["evaluate", "lama"]])
def test_a_name_that_is_nowhere_fails_at_the_first_connection(line, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the Hub is asked again"))
    assert main(line) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: There is no folder lama, and it could not be downloaded: http://127.0.0.1:9 does not"
    )
    assert error.endswith("Correct the path, or connect to the network.\n")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("hub_out_of_reach")
@pytest.mark.parametrize("reason", ["in the cache", "--local-files-only"])
def test_the_hub_is_not_asked_for_what_needs_no_download(reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the Hub is asked"))
    if reason == "in the cache":
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **where: str(tmp_path))
    line = ["inspect", "lama", "--local-files-only"]
    monkeypatch.setattr("hf_awq_offload.cli.inspect.run", lambda options: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        main(line if reason != "in the cache" else line[:2])


def test_a_plan_needs_no_out_and_leaves_nothing(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(tiny_llama_dir), "--plan", *FAST]) == 0
    printed = capsys.readouterr().out
    shown = {line[:24].strip(): line[24:] for line in printed.splitlines()}
    assert "accelerator peak" not in shown, "there is none"
    assert shown["RAM peak"].endswith(" GiB")
    assert shown["disk"].endswith(" MiB")
    assert list(tmp_path.iterdir()) == []


def test_a_run_prints_nothing_of_other_libraries(tiny_llama_dir, tmp_path, capsys):
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *FAST]) == 0
    printed = capsys.readouterr()
    assert "calibration loss: " in printed.out
    assert " × round-to-nearest" in printed.out
    assert "[4/4] model.layers.3: loss" in printed.err
    assert "meta device" not in printed.err
    assert "Writing model shards" not in printed.err
    assert "\r" not in printed.err


def test_verbose_says_what_the_program_does_and_prints_no_configs(tiny_llama_dir, tmp_path, capsys, caplog):
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *FAST, "--verbose"]) == 0
    said = {record.name.split(".")[1] for record in caplog.records if record.levelname == "INFO"}
    assert said <= {"hf_awq_offload"}
    log = "\n".join(caplog.messages) + capsys.readouterr().err
    assert "model.layers.3: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: " in log
    assert "Model config" not in log
    assert logging.getLogger("transformers.hf_awq_offload").level == logging.NOTSET, "later calls are as before"


def test_bars_of_transformers_stay_out_of_log_files(tiny_llama_dir, tmp_path, capsys):
    (tmp_path / "text").write_text("Some words of a text. " * 20)
    line = ["evaluate", str(tiny_llama_dir), "--dataset", str(tmp_path / "text"), "--tokens", "64", "--new-tokens", "0"]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("perplexity")
    assert "\r" not in printed.err
    assert "Loading weights" not in printed.err


def test_warnings_of_the_command_line_name_options(caplog):
    options = argparse.Namespace(command="quantize", quiet=False, verbose=False)
    logger = get_logger("hf_awq_offload.calibration.dataset")
    with spoken_as_asked(options):
        logger.warning("n_samples is %d; set `dataset` to more.", 3)
    logger.warning("n_samples is %d; set `dataset` to more.", 3)
    assert caplog.messages == ["--n-samples is 3; set `--dataset` to more.", "n_samples is 3; set `dataset` to more."]


def test_the_demo_ends_with_what_to_do_next():
    steps = next_steps("a folder").splitlines()
    assert steps[1] == "What to do next:"
    assert steps[2].endswith("hf-awq-offload inspect 'a folder'")
    assert any(step.endswith(" quantize SRC OUT") for step in steps)
    assert "inspect" not in next_steps(None)


def test_the_table_of_the_demo_is_aligned_and_fits_80_columns():
    found = Evaluation(47.5, 0.0195, 0.885, 24528)
    rows = [Row("round to nearest, w4 g128", found, 2_290_000, 1234.5), Row("full precision", found, 5_780_000, None)]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) < 80
