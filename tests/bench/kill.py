"""Kills `quantize` at random moments and inside every step of a commit, resumes, and compares with a run left alone.

    python tests/bench/kill.py [--moments 30]

A tiny Llama of five layers; every run is a process of its own. A step is a call of fsync, rename, unlink or a write; a
run is killed before and after each of those that the third layer's commit, the last one and the end consist of.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from killing import Run, commit_and_end, digests, run_to_the_end, steps_of
from models import save_model, tiny_llama, token_recipe


def experiment(folder: Path, seed: int, moments: int) -> tuple[list[str], int]:
    """Returns the interruptions after which files differed, and the number of all interruptions."""
    source = save_model(tiny_llama(num_hidden_layers=5), folder / "source")
    recipe = {name: getattr(token_recipe(), name) for name in ("dataset", "n_samples", "max_seq_len", "batch_tokens")}
    recipe |= {"group_size": 32, "n_grid": 3}
    reference = Run(source, folder / "reference" / "out", folder / "reference-journal", recipe)
    run_to_the_end(reference)
    expected = digests(reference.target)
    _, seconds = run_to_the_end(Run(source, folder / "timed", folder / "timed-journal", recipe))  # modules are loaded
    steps = steps_of(Run(source, folder / "counted", folder / "counted-journal", recipe))
    rng = random.Random(seed)
    kills = [(f"after {t:.2f} s", t, None) for t in sorted(rng.uniform(0, seconds) for _ in range(moments))]
    kills += [(f"at step {step}, {steps[step - 1]}", None, step) for step in commit_and_end(steps, layer=2)]
    wrong = []
    for words, after_s, step in kills:
        run = Run(source, folder / "out", folder / "journal", recipe)
        finished, _ = run_to_the_end(run, after_s, step)
        journal = sorted(path.name for path in run.journal.glob("layer-*.json"))
        if not finished and run.target.exists():
            finished = digests(run.target) == expected  # killed after the rename
        if not finished:
            finished, _ = run_to_the_end(run)
        same = finished and digests(run.target) == expected
        print(f"killed {words:28} {len(journal)} layers were committed   {'same' if same else 'DIFFERENT'}", flush=True)
        if not same:
            wrong.append(words)
        for left in (run.target, run.journal, run.target.with_name(".out.work")):
            shutil.rmtree(left, ignore_errors=True)
    return wrong, len(kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wrong, kills = experiment(Path(scratch), options.seed, options.moments)
    print(f"{kills} interruptions, {kills - len(wrong)} of them with the same output, bit for bit")
    sys.exit(bool(wrong))
