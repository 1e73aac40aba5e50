"""Changes one thing at a time in the package's pure parts, and counts the changes that the tests notice.

    make mutants                                                    # a sample, in an environment of its own
    python tests/bench/mutants.py --each 13 --seed 1                # 13 mutants of every module
    python tests/bench/mutants.py --modules formats.grid --each 0   # every mutant of one module
    python tests/bench/mutants.py --folder FOLDER --again           # those that survived there, with the tests of today

mutmut makes the mutants (arithmetic, comparisons, constants, conditions, arguments, strings) and runs, for each, the
tests that call the changed function; `[tool.mutmut]` in pyproject.toml says of which modules and with which tests. It
changes the bodies of functions only: not the tables of a module, and nothing under a decorator. A process that takes
several times as long as its tests usually do counts as killed, and so does one that asks for more than 12 GiB of
addresses.

Everything happens in a copy of the repository in --folder. The table says how many mutants each module has, how many
were tried and how many were killed. The score weights modules by their number of mutants. What no test notices is
printed as a diff.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("hf_awq_offload", "optimum", "tests", "pyproject.toml")
ADDRESSES = 12 * 2**30  # bytes of a process that runs tests
SURVIVED = {0, 5, 33, None}
"""Exit codes that mutmut stores for mutants that no test noticed or called; None: not tried."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts the mutants of the pure modules that the tests notice.")
    parser.add_argument("--each", type=int, default=13, help="mutants per module; 0 takes all (default: 13)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=[], help="such as formats.grid; by default all")
    parser.add_argument("--again", action="store_true", help="try only what survived in --folder")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--processes", type=int, default=1)
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
    _run(args)
    _report(folder, args)


def _chosen(names: list[str], codes: dict[str, int | None], args: argparse.Namespace, module: str) -> list[str]:
    """The mutants of one module to try."""
    if args.modules and module not in args.modules:
        return []
    if args.again:
        return [name for name in names if codes[name] in SURVIVED - {None}]
    return random.Random(f"{args.seed} {module}").sample(sorted(names), min(args.each or len(names), len(names)))


def _run(args: argparse.Namespace) -> None:
    """Lets mutmut write all mutants, time all tests and try a sample: its command line takes names, but lists none."""
    import mutmut.__main__ as mutmut

    collected = mutmut.collect_source_file_mutation_data

    def sampled(*, mutant_names: Any) -> tuple[list[tuple[Any, str, None]], dict[str, Any]]:
        _, files = collected(mutant_names=())
        mutants = []
        for path, file in files.items():
            codes = file.exit_code_by_key
            mutants += [(file, name, None) for name in _chosen(list(codes), codes, args, _module(path))]
        return mutants, files

    mutmut.collect_source_file_mutation_data = sampled
    mutmut._run((), args.processes)


def _module(path: str) -> str:
    """ "hf_awq_offload/formats/grid.py" is "formats.grid"."""
    return ".".join(Path(path).with_suffix("").parts[1:])


def _report(folder: Path, args: argparse.Namespace) -> None:
    """Prints the table, the score with its 95 % interval, and a diff of every survivor."""
    codes: defaultdict[str, dict[str, int | None]] = defaultdict(dict)
    for path in sorted((folder / "mutants" / "hf_awq_offload").rglob("*.meta")):
        module = _module(str(path.relative_to(folder / "mutants")).removesuffix(".meta"))
        codes[module] |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    total = sum(map(len, codes.values()))
    survivors, tried, score, variance = [], 0, 0.0, 0.0
    print("| module | mutants | tried | killed |\n|---|---|---|---|")
    for module, results in codes.items():
        names = [name for name, code in results.items() if code is not None]
        if not names:
            continue
        alive = [name for name in names if results[name] in SURVIVED]
        survivors += alive
        tried += len(names)
        killed, weight = len(names) - len(alive), len(results) / total
        score += weight * killed / len(names)
        # Drawn without replacement; the rule of succession keeps a module without survivors from counting as certain.
        likely = (killed + 1) / (len(names) + 2)
        variance += weight**2 * likely * (1 - likely) / len(names) * (1 - len(names) / len(results))
        print(f"| {module} | {len(results)} | {len(names)} | {killed} |")
    print(f"| all | {total} | {tried} | {tried - len(survivors)} |")
    if not args.modules:
        print(f"\nkilled, modules weighted: {score:.1%} ± {1.96 * math.sqrt(variance):.1%}\n")
    for name in survivors:
        command = [sys.executable, "-m", "mutmut", "show", name]
        shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.splitlines()
        print(
            name, *(line for line in shown if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")), sep="\n    "
        )


if __name__ == "__main__":
    main()
