"""What is measured on: the card, its driver, versions; and the rates that the other figures are to be seen beside."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from .device import GIB, copy_gb_per_s, milliseconds, rate
from .recorder import Recorder

PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "peft", "psutil", "datasets", "pytest")


def run(recorder: Recorder) -> None:
    card = torch.cuda.get_device_properties(0)
    for name in ("torch", "triton", "transformers"):
        recorder.figure(f"environment.{name}", _version(name))
    recorder.figure("environment.driver", _driver())
    recorder.details(
        "machine",
        card=card.name,
        capability=f"{card.major}.{card.minor}",
        gib=round(card.total_memory / GIB, 2),
        multiprocessors=card.multi_processor_count,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        python=platform.python_version(),
        cpus=os.cpu_count(),
        compiler=shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
        commit=recorder.commit,
        packages={name: _version(name) for name in PACKAGES},
    )
    free, total = torch.cuda.mem_get_info()
    if free < 0.9 * total:
        recorder.details("the card is used by others", gib_free=round(free / GIB, 1), gib_in_all=round(total / GIB, 1))
    with recorder.attempt("copies"):
        count = (1 << 20) if recorder.is_small else (1 << 30)
        recorder.figure("environment.copy_gb_per_s", copy_gb_per_s(count))
        there = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
        pageable = torch.ones(count // 2, dtype=torch.uint8)
        pinned = pageable.pin_memory()
        for name, source in (("pinned", pinned), ("pageable", pageable)):
            took = milliseconds([lambda source=source: there.copy_(source, non_blocking=True)], 5)
            recorder.figure(f"environment.{name}_gb_per_s", rate(count // 2, took) / 1e9)
    with recorder.attempt("products"):
        width = 128 if recorder.is_small else 8192
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            left, right = (torch.randn(width, width, device="cuda").to(dtype) for _ in range(2))
            took = milliseconds([lambda left=left, right=right: left @ right] * 2, 5)
            recorder.figure(f"environment.{name}_tflops", rate(2 * width**3, took) / 1e12)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Returns the driver's version, as nvidia-smi or ROCm's kernel module tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        return lines[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        with open("/sys/module/amdgpu/version", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return "unknown"
