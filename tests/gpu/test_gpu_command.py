"""The command that measures on a GPU: it runs through on the simulated one, and what goes wrong costs only itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated_gpu.build import why_not
from simulated_gpu.suites import SUITES

from gpu import figures, processes
from gpu.__main__ import FAILED, PASSED, TIME_RAN_OUT, exit_code
from gpu.card_tests import CARD_TESTS, NOT_SIMULATED
from gpu.figures import CARDS, ROWS, table, values_of
from gpu.parts import BY_NAME, PARTS, Part
from gpu.processes import Outcome, Runner
from gpu.results import ROOT, Results
from gpu.suite import result_in

needs_simulation = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
OUTSIDE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ONLY_ON_A_CARD = ("_compiled", "_graph", "_graph_us", "linears.*_gb_per_s", "_share", "memory.least_limit")


def command(*arguments: str, module: str = "tests.gpu", **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "SIMULATED_GPU_STARTED"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=kept | OUTSIDE | environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- on the simulated GPU ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_simulation
def test_every_part_runs_through_on_the_simulated_gpu(tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text('{"run": "an earlier one"}\n')
    result = command("--small", "--simulated", "--together", "--out", str(out), "--commit", "abc1234")
    assert result.returncode == PASSED, result.stdout[-6000:]
    records = records_of(out)
    assert records[0] == {"run": "an earlier one"}
    outcomes = {record["outcome"]["part"]: record["outcome"]["status"] for record in records if "outcome" in record}
    assert outcomes == dict.fromkeys(BY_NAME, "passed")
    reported = {record["figure"] for record in records if "figure" in record}
    missing = {key for row in ROWS for key in row.keys} - reported
    card_only = {key for key in missing if any(_fits(key, form) for form in ONLY_ON_A_CARD)}
    assert missing == card_only, "these figures of the table are reported by no part"
    left_out = [record["why"] for record in records if "not_run" in record]
    assert "a CUDA graph can't be simulated" in left_out
    assert "torch.compile can't be simulated" in left_out
    assert "measures nothing" in result.stdout
    assert "abc1234" in result.stdout


def _fits(key: str, form: str) -> bool:
    return bool(re.search(form.replace(".", r"\.").replace("*", ".*") + "$", key))


@pytest.mark.slow
@needs_simulation
def test_each_part_has_a_process_of_its_own(tmp_path):
    out = tmp_path / "results.jsonl"
    result = command("--small", "--simulated", "--only", "linears,environment", "--out", str(out))
    assert result.returncode == PASSED, result.stdout[-4000:]
    begun = [record["part"] for record in records_of(out) if "begins" in record]
    assert begun == ["linears", "environment"]


# -- without a card ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("sys.modules['torch'].cuda.is_available()", reason="this machine has a card")
def test_without_a_card_it_says_so_and_ends(tmp_path):
    out = tmp_path / "results.jsonl"
    result = command("--only", "environment,linears", "--out", str(out))
    assert result.returncode == FAILED
    assert "torch.cuda.is_available() is False; --small --simulated runs without a card" in result.stdout
    assert not [record for record in records_of(out) if record.get("part") == "linears"]


def test_a_part_without_its_packages_is_not_run_and_no_failure(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name in ('peft', 'psutil') else find(name, package)\n"
    )
    out = tmp_path / "results.jsonl"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = command("--only", "adapters", "--out", str(out), PYTHONPATH=paths)
    assert "peft and psutil are not installed" in result.stdout
    assert [record["why"] for record in records_of(out) if "not_run" in record] == ["peft and psutil are not installed"]
    assert not any("failure" in record for record in records_of(out))


def test_the_package_imports_without_what_few_of_its_parts_need():
    blocked = ("datasets", "optimum", "peft", "pytest", "matplotlib")
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from hf_awq_offload import AwqLinear, AwqOffloadConfig, plan, quantize, quantize_model
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | OUTSIDE, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_package_that_is_not_installed_is_told_its_version(tmp_path, monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(processes, "version", not_found)
    (folder,) = processes._metadata_folder(tmp_path)
    (found,) = importlib.metadata.distributions(path=[folder])
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert (found.name, found.version) == ("hf_awq_offload", line.split('"')[1])


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_it_with_the_interpreter_that_it_is_given():
    result = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", "GPU=--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--simulated" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "answer"), [(["--simulated"], "asks for --small"), (["--only", "kernels,lora"], "lora is no part")]
)
def test_a_wrong_option_is_answered(arguments, answer):
    result = command(*arguments)
    assert result.returncode == 2
    assert answer in result.stderr


# -- what goes wrong costs only itself ---------------------------------------------------------------------------------

PROGRAM = """
import json, os, subprocess, sys, time
def tell(**record): print("\\nRESULT " + json.dumps({"part": NAME} | record), flush=True)
print("READY", flush=True)
sys.stdin.readline()
tell(begins=1)
"""
PROGRAMS = {
    "passes": "tell(figure='figure', value=1)\ntell(finished=0.1)",
    "fails": "tell(failure='a product', why='it is wrong')\ntell(finished=0.1)\nsys.exit(1)",
    "lacks": "tell(not_run=NAME, why='peft is not installed')\ntell(finished=0.0)",
    "crashes": "tell(figure='before', value=2)\nprint('the last words', flush=True)\nos.kill(os.getpid(), 11)",
    "tells half": "print('\\r 50%', end='')\n"
    "tell(figure='after a bar', value=3)\nprint('RESULT {\"part\": ', flush=True)\n"
    "tell(finished=0.1)",
    "hangs": "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "tell(figure='child', value=child.pid)\ntime.sleep(600)",
}


def run_programs(*names: str, limit: float = 60.0) -> tuple[list[Outcome], list[dict], list[Part]]:
    parts = [Part(name, 2 if name == "hangs" else 30, "", worth_seconds=1) for name in names]
    heard: list[dict] = []

    def line(group) -> list[str]:
        return [sys.executable, "-c", f"NAME = {group[0].name!r}{PROGRAM}{PROGRAMS[group[0].name]}"]

    runner = Runner(line, limit, 1.0, heard.append, lambda text: None)
    return runner.run([[part] for part in parts]), heard, parts


def test_a_part_that_fails_crashes_or_hangs_costs_only_itself():
    outcomes, heard, parts = run_programs("fails", "crashes", "hangs", "lacks", "passes")
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "failed", "not run", "passed"]
    assert [outcome.why for outcome in outcomes][:4] == [
        "a product: it is wrong",
        "its process ended with -11",
        "did not end within 2 s",
        "peft is not installed",
    ]
    assert values_of(heard)["before"] == 2, "what was reported before the crash is kept"
    assert ["the last words"] in [record.get("last_lines") for record in heard]
    _assert_ended(values_of(heard)["child"])
    assert exit_code(parts, outcomes) == FAILED


def _assert_ended(process: int) -> None:
    for _ in range(50):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a process that the part had started is still there")


def test_half_a_line_is_no_record_and_takes_none_along():
    outcomes, heard, _ = run_programs("tells half")
    assert [outcome.status for outcome in outcomes] == ["passed"]
    assert values_of(heard) == {"after a bar": 3}


def test_an_extra_that_there_is_no_time_for_is_no_failure():
    part = Part("hangs", 1, "", is_extra=True)
    line = [sys.executable, "-c", f"NAME = 'hangs'{PROGRAM}{PROGRAMS['hangs']}"]
    outcomes = Runner(lambda group: line, 60.0, 1.0, lambda record: None, lambda text: None).run([[part]])
    assert [outcome.status for outcome in outcomes] == ["no time"]


def test_where_the_time_is_over_the_rest_is_not_started():
    outcomes, _, parts = run_programs("hangs", "passes", limit=2.5)
    assert [outcome.status for outcome in outcomes] == ["failed", "no time"]
    assert exit_code(parts, outcomes) == FAILED


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({}, PASSED),
        ({"whole_7b": "no time"}, PASSED),
        ({"adapters": "no time", "whole_7b": "no time"}, TIME_RAN_OUT),
        ({"adapters": "not run"}, PASSED),
        ({"kernels": "failed", "adapters": "no time"}, FAILED),
        (dict.fromkeys(BY_NAME, "not run"), FAILED),
    ],
    ids=str,
)
def test_the_exit_code_tells_whether_all_has_passed(statuses, expected):
    outcomes = [Outcome(part.name, statuses.get(part.name, "passed"), 1.0) for part in PARTS]
    assert exit_code(PARTS, outcomes) == expected


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_are_appended_and_new_files_have_new_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = Results(Path("results/kept.jsonl"), "abc")
    kept.add({"figure": "a", "value": 1})
    again = Results(Path("results/kept.jsonl"), "abc")
    again.add({"figure": "a", "value": 2})
    assert [record["value"] for record in records_of(kept.path)] == [1, 2]
    paths = []
    for _ in range(3):
        results = Results(None, "abc")
        results.add({"figure": "a", "value": 1})
        paths.append(results.path)
    assert len(set(paths)) == 3


def test_a_cell_shows_what_was_measured():
    row = figures.Row("", ("a", "b", "c"), "{:.1f} / {} / {:.0%}")
    assert row.cell({}) == ""
    assert row.cell({"a": 1.25, "b": True, "c": 0.5}) == "1.2 / yes / 50%"
    assert row.cell({"a": None, "b": False}) == "– / no / –"


def test_the_page_has_the_rows_of_the_table_and_a_column_for_each_card():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table({card: {} for card in CARDS}).splitlines()]
    found = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    labels = [cells[0] for cells in found]
    missing = [cells[0] for cells in rows if cells[0] not in labels]
    assert not missing, f"docs/gpu.md lacks rows; the table:\n{table({card: {} for card in CARDS})}"
    assert " | ".join(rows[0]) in page


# -- tests of the suite ------------------------------------------------------------------------------------------------


def test_every_test_that_needs_a_card_is_on_the_list():
    asks = re.compile(
        r"\bneeds_gpu\b|\bHAS_GPU\b|^from backends import .*\b(BACKENDS|DEVICE)\b|(cuda|accelerator)\.is_available\(",
        re.MULTILINE,
    )
    tests = ROOT / "tests"
    apart = {"gpu", "simulated_gpu", "bench"}  # this folder; what is for the simulated GPU; no tests
    files = [path for path in tests.rglob("test_*.py") if path.relative_to(tests).parts[0] not in apart]
    asking = {str(path.relative_to(ROOT)) for path in files if asks.search(path.read_text(encoding="utf-8"))}
    listed = {test.partition("::")[0] for test in CARD_TESTS}
    assert len(asking) >= 4
    assert asking <= listed, "add them to tests/gpu/card_tests.py"
    for test in CARD_TESTS:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8")


def test_what_a_card_runs_the_simulated_gpu_runs_in_every_build():
    """So that what fails on a card fails because of the card."""
    simulated = {argument.partition("::")[0] for suite in SUITES for argument in suite.arguments}
    wanted = {test.partition("::")[0] for test in CARD_TESTS} - set(NOT_SIMULATED)
    assert wanted <= simulated, "add them to tests/simulated_gpu/suites.py"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[gw3] [ 12%] PASSED tests/ops/test_a.py::test_b[1 2] ", ("PASSED", "tests/ops/test_a.py::test_b[1 2]")),
        ("tests/ops/test_a.py::test_b[x] FAILED      [ 50%]", ("FAILED", "tests/ops/test_a.py::test_b[x]")),
        ("tests/ops/test_a.py::test_b SKIPPED (needs a GPU) [ 50%]", ("SKIPPED", "tests/ops/test_a.py::test_b")),
        ("tests/ops/test_a.py::test_b ", None),
        ("FAILED tests/ops/test_a.py::test_b - assert 1 == 2", None),
        ("3 passed in 0.1s", None),
    ],
)
def test_lines_of_pytest_are_read(line, expected):
    assert result_in(line) == expected
