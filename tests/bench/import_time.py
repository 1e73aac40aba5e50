"""Measures what importing the package costs beside importing transformers: medians of alternating processes.

    python tests/bench/import_time.py [--runs 9]

Times are processor time of the import alone, without the start of the interpreter; ratios are within one run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

IMPORTS = {
    "transformers": "import transformers",
    "the package": "import hf_awq_offload",
    "both": "import hf_awq_offload, transformers",
    "a dense model's class": "from transformers import LlamaForCausalLM",
    "that, and the recipe": "from hf_awq_offload import AwqOffloadConfig; from transformers import LlamaForCausalLM",
}
COMPARED = {"the package": "transformers", "both": "transformers", "that, and the recipe": "a dense model's class"}

PROGRAM = """
import time
start = time.process_time()
{}
print(time.process_time() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    seconds = measured(options.runs)
    for name, statement in IMPORTS.items():
        ratio = f"{seconds[name] / seconds[COMPARED[name]]:8.3f} of {COMPARED[name]}" if name in COMPARED else ""
        print(f"{seconds[name]:8.3f} s  {statement:90}{ratio}")


def measured(runs: int) -> dict[str, float]:
    """Returns the median seconds of every import; a first round that fills the file system's cache is left out."""
    rounds = [{name: once(statement) for name, statement in IMPORTS.items()} for _ in range(runs + 1)]
    return {name: statistics.median(each[name] for each in rounds[1:]) for name in IMPORTS}


def once(statement: str) -> float:
    command = [sys.executable, "-c", PROGRAM.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
