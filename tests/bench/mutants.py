"""Changes one thing at a time in the package's pure parts, and counts the changes that the tests notice.

    make mutants                                                    # a sample
    python tests/bench/mutants.py --each 13 --seed 1                # 13 mutants of every module
    python tests/bench/mutants.py --modules formats.grid --each 0   # every mutant of one module
    python tests/bench/mutants.py --folder FOLDER --again           # those that survived there, with the tests of today

mutmut writes the mutants (arithmetic, comparisons, constants, conditions, arguments, strings) of the modules that
`[tool.mutmut]` in pyproject.toml names. It changes bodies of functions only: no tables of a module, nothing under a
decorator. The tests that pyproject.toml names there are collected once; from then on every mutant is a fork, which runs
the tests that call the changed function, the fastest first, until one fails. (mutmut's own runner collects the tests
again for each mutant, which takes longer than running them.) A fork that takes much more processor time than its tests
usually do counts as killed, and so does one that asks for more than 12 GiB of addresses.

Everything happens in a copy of the repository in --folder. The table says how many mutants each module has, how many
were tried and how many were killed. What --folder holds is not tried again, so a run that was stopped goes on. The
score weights modules by their number of mutants. Mutants that no test notices are printed as diffs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("hf_awq_offload", "optimum", "tests", "pyproject.toml")
ADDRESSES = 12 * 2**30  # bytes of a process that runs tests
TIMES, MORE_SECONDS = 2, 10
"""A fork may take so many times the processor time of its tests, and so many seconds more."""
RESULTS, TIMED = "results.json", "tests.json"
"""In --folder: mutant -> 0 if it survived; test -> its seconds, and the functions that it calls."""
WALL_TIMES = 20
"""It may take so many times that by the clock, since other processes may run beside it."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the mutants of the pure modules that the tests notice.")
    parser.add_argument("--each", type=int, default=13, help="mutants per module; 0 takes all (default: 13)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=[], help="such as formats.grid; by default all")
    parser.add_argument("--again", action="store_true", help="try only what survived in --folder")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="mutants-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (REPOSITORY / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, folder / name, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, folder / name)
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(REPOSITORY))]
    written = _write_mutants()
    before = json.loads(Path(RESULTS).read_text(encoding="utf-8")) if Path(RESULTS).exists() else {}
    if args.again:
        chosen = [name for name, code in before.items() if code == 0]
    else:
        chosen = [name for name in _sample(written, args) if name not in before]
    found = _tried(chosen, before) if chosen else before
    _report(written, found, whole=not args.modules)


def _write_mutants() -> dict[str, list[str]]:
    """Writes all mutants into the folder "mutants"; returns module -> names of its mutants."""
    import mutmut.__main__ as mutmut
    from mutmut.mutation.data import SourceFileMutationData

    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(1)
    written = {}
    for path in sorted(mutmut.walk_mutatable_files()):
        file = SourceFileMutationData(path=path)
        file.load()
        if file.exit_code_by_key:
            written[".".join(path.with_suffix("").parts[1:])] = sorted(file.exit_code_by_key)
    return written


def _sample(written: dict[str, list[str]], args: argparse.Namespace) -> list[str]:
    """The mutants to try."""
    return [
        name
        for module, names in written.items()
        if not args.modules or module in args.modules
        for name in random.Random(f"{args.seed} {module}").sample(names, min(args.each or len(names), len(names)))
    ]


def _tried(mutants: list[str], before: dict[str, int]) -> dict[str, int]:
    """Tries some mutants; returns mutant -> 0 if it survived, with what was found before."""
    from mutmut.configuration import config

    options = ["-q", "-s", "--rootdir=.", *config().pytest_add_cli_args, *config().pytest_add_cli_args_test_selection]
    forks = Forks(mutants, before, Path.cwd())
    os.chdir("mutants")
    code = pytest.main(options, plugins=[forks])
    os.chdir("..")
    if not forks.found.keys() >= set(mutants):
        raise SystemExit(f"The tests could not be run (exit code {code}).")
    return forks.found


class Forks:
    """A plugin of pytest: runs the collected tests once as they are, then those of each mutant, each time in a fork."""

    def __init__(self, mutants: list[str], found: dict[str, int], folder: Path):
        self.mutants = mutants
        self.found = dict(found)
        self.results, self.timed = folder / RESULTS, folder / TIMED

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        known = json.loads(self.timed.read_text(encoding="utf-8")) if self.timed.exists() else {}
        new = [item for item in session.items if item.nodeid not in known]
        if _in_fork(lambda: self._time(new, known), 3600, 3600):
            raise SystemExit("The tests fail without any change.")
        tests = json.loads(self.timed.read_text(encoding="utf-8"))
        for i, mutant in enumerate(self.mutants, 1):
            function = mutant.partition("__mutmut_")[0]
            items = [item for item in session.items if function in tests[item.nodeid]["calls"]]
            items.sort(key=lambda item: tests[item.nodeid]["seconds"])
            seconds = TIMES * sum(tests[item.nodeid]["seconds"] for item in items) + MORE_SECONDS
            self.found[mutant] = _in_fork(lambda mutant=mutant, items=items: _fails(mutant, items), seconds, seconds)
            self.results.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
            print(f"{i}/{len(self.mutants)} {mutant}: {self.found[mutant]}, {len(items)} tests", flush=True)
        return True

    def _time(self, items: list[Any], known: dict[str, Any]) -> bool:
        """Runs tests, and writes how long each takes and which functions it calls; returns whether one failed."""
        from mutmut.mutation.trampoline import set_mutant_under_test
        from mutmut.state import state

        set_mutant_under_test("stats")
        tests = dict(known)
        for item, following in zip(items, [*items[1:], None], strict=True):
            state()._stats.clear()
            start = time.process_time()
            if _run(item, following):
                print(f"{item.nodeid} fails without any change", file=sys.stderr)
                return True
            tests[item.nodeid] = {"seconds": time.process_time() - start, "calls": sorted(state()._stats)}
        self.timed.write_text(json.dumps(tests), encoding="utf-8")
        return False


def _fails(mutant: str, items: list[Any]) -> bool:
    """Whether a test notices a mutant."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    os.dup2(1, 2)  # progress bars and warnings go where the output goes
    set_mutant_under_test(mutant)
    return any(_run(item, following) for item, following in zip(items, [*items[1:], None], strict=True))


def _run(item: Any, following: Any) -> bool:
    """Runs a test; returns whether it failed."""
    from _pytest.runner import runtestprotocol

    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def _in_fork(job: Any, processor_seconds: float, seconds: float) -> int:
    """Runs `job` in a fork; returns 0 if it returns False, 1 if True, and another number if it does not return."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 2
        try:
            limit = math.ceil(processor_seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            code = int(job())
        finally:
            os._exit(code)
    end = time.monotonic() + WALL_TIMES * seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = math.inf
        time.sleep(0.02)


def _report(written: dict[str, list[str]], found: dict[str, int], whole: bool) -> None:
    """Prints the table, the score with its 95 % interval, and a diff of every survivor."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    total = sum(map(len, written.values()))
    score, variance = 0.0, 0.0
    print("\n| module | mutants | tried | killed |\n|---|---|---|---|")
    for module, names in written.items():
        tried = [name for name in names if name in found]
        if not tried:
            continue
        killed, weight = sum(found[name] != 0 for name in tried), len(names) / total
        score += weight * killed / len(tried)
        # Drawn without replacement; the rule of succession keeps a module without survivors from counting as certain.
        likely = (killed + 1) / (len(tried) + 2)
        variance += weight**2 * likely * (1 - likely) / len(tried) * (1 - len(tried) / len(names))
        print(f"| {module} | {len(names)} | {len(tried)} | {killed} |")
    survivors = [name for name, code in found.items() if code == 0]
    print(f"| all | {total} | {len(found)} | {len(found) - len(survivors)} |")
    if whole:
        print(f"\nkilled, modules weighted: {score:.1%} ± {1.96 * math.sqrt(variance):.1%}\n")
    for name in survivors:
        diff = get_diff_for_mutant(name).splitlines()
        print(name, *(line for line in diff if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")), sep="\n    ")


if __name__ == "__main__":
    main()
