"""Writes random checkpoints layer by layer for memory benchmarks, and runs code that measures itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 1024, 1536, 2048, 8
POLL_S = 0.02
FP8_BLOCK = 128


def make_checkpoint(
    folder: Path, n_layers: int, layers_per_shard: int = 8, source: str = "bf16", **changes: Any
) -> Path:
    """Writes a Llama with only one shard in memory at a time, its linears in bf16 or in FP8 with block scales."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": n_layers,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    config = LlamaConfig(**sizes | changes)
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    if source == "fp8":
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[int, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        shard = int(parts[2]) // layers_per_shard if "layers" in parts else -1
        shards.setdefault(shard, {})[name] = shape
    weight_map = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in names.items()}
        if source == "fp8":
            tensors = {key: part for name, value in tensors.items() for key, part in _in_fp8(name, value).items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)


def _in_fp8(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what DeepSeek-V3's format stores for a tensor."""
    if not name.endswith("_proj.weight"):
        return {name: value}
    blocks = value.float().unfold(0, FP8_BLOCK, FP8_BLOCK).unfold(1, FP8_BLOCK, FP8_BLOCK)
    scale = blocks.abs().amax((-1, -2)) / 448
    full = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return {name: (value.float() / full).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def token_ids(folder: Path, sequences: int, tokens: int) -> list[list[int]]:
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (sequences, tokens), generator=generator).tolist()


MEASURED = """
import json, sys, time, warnings
sys.path[:0] = {paths!r}
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from transformers.utils import logging
logging.disable_progress_bar(); logging.set_verbosity_error()
from made import *
from hf_awq_offload import AwqOffloadConfig, quantize
from hf_awq_offload.offload.memory_use import MemoryMeter
meter = MemoryMeter(torch.device("cpu"))
{limit}
start = time.perf_counter(), time.process_time()
{body}
seconds = time.perf_counter() - start[time.perf_counter is time.process_time]
result = {{"seconds": seconds, "cpu_seconds": time.process_time() - start[1],
          "above": meter.peak_bytes()[0], "baseline": meter.baseline_bytes, **locals().get("more", {{}})}}
print("RESULT", json.dumps(result))
"""


def measured(body: str, limit: str = "", folder: Path | None = None) -> dict[str, Any]:
    """Runs Python code in a process of its own; returns seconds, and memory before and at its peak, in bytes.

    With `folder`, also the most that lay in it at any time beyond what was there before ("disk").
    """
    here = Path(__file__).resolve().parent
    code = MEASURED.format(paths=[str(here), str(here.parents[1])], body=body, limit=limit)
    with _watched(folder) as sizes:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"the measured run failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result = {"disk": max(sizes) - sizes[0]}
    return result | json.loads(lines[0].removeprefix("RESULT "))


@contextmanager
def _watched(folder: Path | None) -> Iterator[list[int]]:
    """Collects a folder's total size every few milliseconds; the first is the size before."""
    sizes = [_bytes_in(folder)]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_S):
            sizes.append(_bytes_in(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        is_over.set()
        thread.join()


def _bytes_in(folder: Path | None) -> int:
    total = 0
    for parent, _, files in os.walk(folder) if folder is not None else ():
        for file in files:
            with suppress(OSError):  # deleted in the meantime
                total += os.path.getsize(os.path.join(parent, file))
    return total
