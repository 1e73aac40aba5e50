"""Runs `quantize` and kills it with SIGKILL, after a time or inside a step of a commit; nothing is cleaned up.

Each run is a process forked from a server that has already imported torch, so that runs start fast.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = {"os": ("fsync", "replace"), "Path": ("write_text", "unlink"), "journal": ("write_all",)}
"""The calls that a commit is made of; a run can be killed before and after each of them."""


@dataclass(frozen=True)
class Run:
    """The arguments of one `quantize` run."""

    source: Path
    target: Path
    journal: Path
    recipe: dict[str, Any]  # fields of AwqOffloadConfig


def processes() -> Any:
    """Returns the multiprocessing context whose processes have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_awq_offload", "killing"])
    return context


def run_to_the_end(run: Run, kill_after_s: float | None = None, kill_at_step: int | None = None) -> tuple[bool, float]:
    """Returns whether the run finished, and its seconds; it is killed after a time, or at a step, if given."""
    process = processes().Process(target=_work, args=(run, kill_at_step))
    start = time.perf_counter()
    process.start()
    process.join(kill_after_s)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    seconds = time.perf_counter() - start
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run ended with exit code {process.exitcode}")
    return process.exitcode == 0, seconds


def steps_of(run: Run) -> list[str]:
    """Returns the steps of an undisturbed run; step 1 is the first of them."""
    with processes().Manager() as manager:
        steps = manager.list()
        process = processes().Process(target=_work, args=(run, None, steps))
        process.start()
        process.join()
        assert process.exitcode == 0
        return list(steps)


def commit_and_end(steps: list[str], layer: int) -> list[int]:
    """Returns the step numbers of one layer's commit, and of everything after the last commit."""
    begins = [number for number, words in enumerate(steps, 1) if words == "before write_all"]
    return [*range(begins[layer], begins[layer + 1]), *range(begins[-1], len(steps) + 1)]


def digests(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def _work(run: Run, kill_at_step: int | None, steps: Any = None) -> None:
    import torch
    from transformers.utils import logging

    from hf_awq_offload import AwqOffloadConfig, quantize

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    counter = _Counter(kill_at_step)
    counter.watch()
    quantize(run.source, run.target, AwqOffloadConfig(**run.recipe), checkpoint_dir=run.journal)
    if steps is not None:
        steps.extend(counter.steps)


class _Counter:
    """Counts the steps and kills the process at one of them."""

    def __init__(self, kill_at: int | None):
        self.kill_at = kill_at
        self.steps: list[str] = []
        self._lock = threading.Lock()

    def watch(self) -> None:
        from hf_awq_offload.offload import journal

        for owner, names in ((os, STEPS["os"]), (Path, STEPS["Path"]), (journal, STEPS["journal"])):
            for name in names:
                setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self._next(f"before {call.__name__}")
            result = call(*args, **kwargs)
            self._next(f"after {call.__name__}")
            return result

        return step

    def _next(self, words: str) -> None:
        with self._lock:  # the journal has a thread
            self.steps.append(words)
            if len(self.steps) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
