"""Runs an operation again and again; each time another one of its calls to the system fails. Prints what is wrong.

    LD_PRELOAD=failing_calls.so python sweeping.py FOLDER OPERATION FAULT [--every N] [--first N]

An operation gets a folder of its own. After a failure, the source is as it was, and the output as before or complete.
Repeated without the fault, the operation ends with the bytes of an undisturbed one, and leaves nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from injection import FAULTS, Fault, failing
from models import save_model, tiny_llama, token_recipe
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_awq_offload import AwqOffloadError, quantize, quantize_model
from hf_awq_offload.checkpoint.conversion import convert_checkpoint
from hf_awq_offload.reporting import files as report_files

RECIPE: dict[str, Any] = {"n_grid": 1, "clip": False, "rounding": "nearest"}
ADVICE = ("epeat the call", "again", "make room", "Make room", "Correct", "ame another folder")


def tree(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder; "" for folders."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


class Operation:
    """Something that reads `source` and writes below `place`."""

    is_whole = True
    """Whether the output appears all at once."""

    def __init__(self, folder: Path):
        self.folder, self.source, self.place = folder, folder / "source", folder / "place"
        save_model(tiny_llama(), self.source)

    @property
    def out(self) -> Path:
        return self.place / "out"

    def prepare(self) -> None:
        """Makes the state before the operation."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def run(self) -> None:
        raise NotImplementedError


class Quantize(Operation):
    """A run with a journal and a report."""

    def run(self) -> None:
        recipe = token_recipe(**RECIPE, report_dir=self.place / "report")
        quantize(self.source, self.out, recipe, checkpoint_dir=self.place / "journal", overwrite=True)


class Requantize(Quantize):
    """The same, where the output replaces another checkpoint; without a journal that stays."""

    def prepare(self) -> None:
        super().prepare()
        shutil.copytree(self.source, self.out)

    def run(self) -> None:
        quantize(self.source, self.out, token_recipe(**RECIPE), overwrite=True)


class Convert(Operation):
    def __init__(self, folder: Path):
        super().__init__(folder)
        full = self.source.rename(folder / "full")
        quantize(full, self.source, token_recipe(**RECIPE))

    def run(self) -> None:
        convert_checkpoint(self.source, self.out, "gemv", overwrite=True)


class Save(Operation):
    """`quantize_model`, then `save_pretrained`, which writes file after file."""

    is_whole = False

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.source)
        quantize_model(self.model, token_recipe(**RECIPE))

    def run(self) -> None:
        self.model.save_pretrained(self.out)


OPERATIONS = {kind.__name__.lower(): kind for kind in (Quantize, Requantize, Convert, Save)}


@dataclass
class Sweep:
    operation: Operation
    fault: Fault

    def __post_init__(self) -> None:
        self.operation.prepare()
        self.source, self.before = tree(self.operation.source), tree(self.operation.place)
        with failing([self.operation.place], 0, self.fault) as counted:
            self.operation.run()
        self.calls, self.after = counted.calls, _without_times(tree(self.operation.place))

    def attempt(self, call: int) -> dict[str, Any]:
        """Has one call fail; returns what happened, and what is wrong with it."""
        operation, wrong, error = self.operation, [], None
        operation.prepare()
        with failing([operation.place], call, self.fault) as counted:
            try:
                operation.run()
            except Exception as caught:
                error = caught
        name = counted.calls[call - 1] if call <= len(counted.calls) else "never called"
        if tree(operation.source) != self.source:
            wrong.append("the source has changed")
        there = _without_times(tree(operation.place))
        out = {path: digest for path, digest in there.items() if path.startswith("out")}
        is_new = out == {path: digest for path, digest in self.after.items() if path.startswith("out")}
        is_old = out == {path: digest for path, digest in self.before.items() if path.startswith("out")}
        has_kept_old = any(path.startswith(".out.work/replaced") for path in there) and not out
        if operation.is_whole and not (is_new or is_old or has_kept_old):
            wrong.append(f"the output is neither absent nor complete: {sorted(out)}")
        if error is None and not is_new:
            wrong.append("no error, and another output")
        if error is not None:
            wrong += self._wrong_with(error)
        if self.fault.name != "read-only" and any(path.startswith(".out.work") for path in there):
            wrong.append(f"the work folder is left: {[path for path in there if path.startswith('.')][:4]}")
        try:
            operation.run()
        except Exception as again:
            wrong.append(f"the repeat failed: {type(again).__name__}: {again}")
        now = _without_times(tree(operation.place))
        if now != self.after:
            changed = sorted(path for path in now.keys() | self.after.keys() if now.get(path) != self.after.get(path))
            wrong.append(f"after the repeat, these differ: {changed}")
        said = "" if error is None else f"{type(error).__name__}: {error}"
        return {"call": f"{call} {name.replace(str(operation.place), '')}", "said": said, "wrong": wrong}

    def _wrong_with(self, error: Exception) -> list[str]:
        text, wrong = str(error), []
        if self.operation.is_whole and not isinstance(error, AwqOffloadError):
            wrong.append(f"raised a {type(error).__name__}")
        elif self.operation.is_whole and not any(words in text for words in ADVICE):
            wrong.append("the error says nothing about what to do")
        if str(self.operation.place) not in text:
            wrong.append("the error names no path")
        return wrong


def _without_times(there: dict[str, str]) -> dict[str, str]:
    """Leaves out the digests of what holds seconds and memory; the names stay."""
    return {path: "" if path.startswith("report/") else digest for path, digest in there.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity(100)
    logging.disable_progress_bar()
    report_files.charts_of = lambda *_: []  # seconds of drawing, which writes nothing
    options.folder.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(OPERATIONS[options.operation](options.folder), FAULTS[options.fault])
    print(json.dumps({"calls": len(sweep.calls)}), flush=True)
    for call in range(options.first, len(sweep.calls) + 1, options.every):
        print(json.dumps(sweep.attempt(call)), flush=True)


if __name__ == "__main__":
    main()
