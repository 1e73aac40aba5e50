"""What a new user meets first: a name that is nowhere, a plan, and a run whose output is its own."""

from __future__ import annotations

import huggingface_hub
import pytest
from command_line import FAST
from huggingface_hub import constants

from hf_awq_offload.cli.main import main


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
