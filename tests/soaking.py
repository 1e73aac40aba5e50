"""Runs quantizations of all kinds in this process and counts what they leave: memory, files, threads, tensors."""

from __future__ import annotations

import ctypes
import gc
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_awq_offload import AwqOffloadConfig, NumericalError, quantize, quantize_model


@dataclass(frozen=True)
class Counts:
    """What a process holds."""

    rss_kib: int
    files: int
    threads: int
    mappings: int
    scratch: int  # entries of the folder for temporary files
    tensors: int

    @classmethod
    def now(cls) -> Counts:
        """Counts after garbage was collected and free memory given back."""
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        process = psutil.Process()
        tensors = sum(type(found) in (torch.Tensor, torch.nn.Parameter) for found in gc.get_objects())
        return cls(
            rss_kib=process.memory_info().rss >> 10,
            files=process.num_fds(),
            threads=threading.active_count(),
            mappings=len(Path("/proc/self/maps").read_text().splitlines()),
            scratch=len(list(Path(tempfile.gettempdir()).iterdir())),
            tensors=tensors,
        )


def recipe(**changes: object) -> AwqOffloadConfig:
    """Returns the recipe of a quantization that takes a second."""
    rows = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0)).tolist()
    fields = {"dataset": rows, "n_samples": 2, "max_seq_len": 32, "n_grid": 1, "clip": False, "rounding": "nearest"}
    return AwqOffloadConfig(**fields | {"group_size": 32} | changes)


def load(source: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, **options)


def in_memory(source: Path, folder: Path) -> None:
    quantize_model(load(source), recipe())


def streamed(source: Path, folder: Path) -> None:
    quantize(source, folder / "out", recipe(checkpoint_dir=folder / "journal"))


def failing(source: Path, folder: Path) -> None:
    """Fails in the last layer, when the others are quantized."""
    model = load(source)
    with torch.no_grad():
        model.model.layers[-1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError):
        quantize_model(model, recipe())


def cancelled(source: Path, folder: Path) -> None:
    """Is interrupted while the second layer runs; the journal stays."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        turns = iter(range(10))
        from hf_awq_offload.pipeline import loop

        whole = loop.quantize_with_statistics
        patch.setattr(
            loop, "quantize_with_statistics", lambda *given: whole(*given) if next(turns) == 0 else interrupt()
        )
        with pytest.raises(KeyboardInterrupt):
            quantize(source, folder / "out", recipe(checkpoint_dir=folder / "journal"))


def loaded_and_saved(source: Path, folder: Path) -> None:
    """Quantizes from the disk while loading, saves, loads, generates and saves again."""
    load(source, quantization_config=recipe(offload="disk", checkpoint_dir=folder / "journal")).save_pretrained(
        folder / "first"
    )
    model = load(folder / "first")
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    model.save_pretrained(folder / "second")


KINDS: tuple[Callable[[Path, Path], None], ...] = (in_memory, streamed, failing, cancelled, loaded_and_saved)


def one(index: int, source: Path) -> Counts:
    """Runs the kind whose turn it is in a folder of its own, deletes that, and counts."""
    folder = Path(tempfile.mkdtemp(prefix="soaking-"))
    KINDS[index % len(KINDS)](source, folder)
    shutil.rmtree(folder)
    return Counts.now()
