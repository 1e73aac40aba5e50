"""Measures speed and memory of the quantized linear against dense ones, and of decoding with it.

    python tests/bench/linear.py [--backend auto] [--runs 15] [--device cpu] [--cpu-time] [--skip-decode]
    python tests/bench/linear.py --crossover [--runs 15] [--cpu-time]

Times are medians of runs that alternate between the contestants, so that a busy machine hurts all of them alike. The
first table divides the time of dense `F.linear` in bf16 (fp32, fp16) by that of the quantized linear with an input of
the same dtype: above 1 the quantized one is faster. Weights are random; speed does not depend on them. With --cpu-time
(for one thread) it is processor time that is compared, which a machine shared with others leaves alone. --crossover
compares the two ways of the C backend, a fused product and one with dequantized blocks, and torch's int4 kernel; then
dequantizing alone, with the C kernel and with plain torch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from hf_awq_offload import AwqLinear, AwqOffloadConfig, quantize_model
from hf_awq_offload.formats.awq import PackedWeight
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.ops import c_backend, torch_backend

logging.disable_progress_bar()

SHAPES = ((4096, 4096), (11008, 4096))  # out, in
ROWS = (1, 8, 32, 128)
GROUP_SIZE = 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--skip-decode", action="store_true")
    parser.add_argument("--crossover", action="store_true")
    options = parser.parse_args()
    if options.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time wants OMP_NUM_THREADS=1")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(
        f"{describe(options.device)}, {threads} threads, torch {torch.__version__}, backend {options.backend}, "
        f"{'processor' if options.cpu_time else 'wall'} time"
    )
    if options.crossover:
        crossover(options)
        return
    with torch.inference_mode():
        for out_features, in_features in SHAPES:
            print(f"\n{out_features} × {in_features}, g{GROUP_SIZE}: time of dense / time of quantized")
            print(f"{'':6}" + "".join(f"{f'M={rows}':>22}" for rows in ROWS))
            linear = random_linear(out_features, in_features, options.device, options.backend)
            for name, dtype in DTYPES.items():
                cells = [compare(linear, rows, dtype, options) for rows in ROWS]
                print(f"{name:6}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    if not options.skip_decode:
        decode(options)


@torch.inference_mode()
def crossover(options: argparse.Namespace) -> None:
    """Returns the milliseconds of each way to multiply, for 4096 × 4096."""
    packed = random_linear(4096, 4096, "cpu", "c").packed
    int4 = random_linear(4096, 4096, "cpu", "cpu")
    weight = torch.randn(4096, 4096)
    print(f"\n4096 × 4096, g{GROUP_SIZE}, ms\n{'rows':>6}{'fused':>8}{'blocks':>8}{'int4':>8}{'fp32':>8}")
    for rows in (1, 8, 32, 64, 128, 192, 256, 384, 512):
        x = torch.randn(rows, 4096)
        ways = [
            lambda x=x: c_backend.product(x, packed),
            lambda x=x: c_backend.product_in_blocks(x, packed),
            lambda x=x: int4(x),
            lambda x=x: nn.functional.linear(x, weight),
        ]
        print(f"{rows:6}" + "".join(f"{ms:8.1f}" for ms in medians_ms(ways, options)), flush=True)
    print(f"\ndequantizing in blocks, ms\n{'':6}{'c':>8}{'torch':>8}")
    for name, dtype in DTYPES.items():
        ways = [
            lambda backend=backend, dtype=dtype: deque(backend.blocks(packed, dtype), maxlen=0)
            for backend in (c_backend.BACKEND, torch_backend.BACKEND)
        ]
        print(f"{name:6}" + "".join(f"{ms:8.1f}" for ms in medians_ms(ways, options)), flush=True)


def compare(linear: AwqLinear, rows: int, dtype: torch.dtype, options: argparse.Namespace) -> str:
    """Returns one cell of the table: the ratio, and both times in milliseconds."""
    weight = torch.randn(linear.out_features, linear.in_features, device=options.device).to(dtype)
    x = torch.randn(rows, linear.in_features, device=options.device).to(dtype)
    dense, quantized = medians_ms([lambda: nn.functional.linear(x, weight), lambda: linear(x)], options)
    return f"{dense / quantized:.2f} ({dense:.1f}/{quantized:.1f} ms)"


def medians_ms(contestants: list[Callable[[], object]], options: argparse.Namespace) -> list[float]:
    """Returns the median time of each contestant in milliseconds; they run in turns."""
    clock = time.thread_time if options.cpu_time else time.perf_counter
    times_ms: list[list[float]] = [[] for _ in contestants]
    for run in range(options.runs + 2):
        for contestant, own_ms in zip(contestants, times_ms, strict=True):
            start = clock()
            contestant()
            if options.device != "cpu":
                torch.accelerator.synchronize()
            if run >= 2:  # the first runs warm up: packing, compiling, caches
                own_ms.append((clock() - start) * 1e3)
    return [statistics.median(own_ms) for own_ms in times_ms]


def random_linear(out_features: int, in_features: int, device: str, backend: str, bias: bool = False) -> AwqLinear:
    words, n = out_features // 8, in_features // GROUP_SIZE
    packed = PackedWeight(
        random_words(in_features, words), random_words(n, words), torch.rand(n, out_features).half() / 100
    )
    linear = AwqLinear.from_packed(
        packed, torch.randn(out_features) if bias else None, Grid(4, GROUP_SIZE, True), torch.bfloat16
    ).to(device)
    linear.backend = backend
    return linear


def random_words(rows: int, words: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int64).to(torch.int32)


def decode(options: argparse.Namespace) -> None:
    """Measures tokens per second of `generate` on a model of eight layers, and the memory of its quantized linears."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16, vocab_size=2048
    )
    print(f"\nLlama of {config.num_hidden_layers} layers, hidden {config.hidden_size}: greedy decoding")
    models = {name: dense_model(config, dtype, options.device) for name, dtype in list(DTYPES.items())[:2]}
    quantized = dense_model(config, torch.bfloat16, options.device)
    bf16_bytes = sum(p.nbytes for name, p in quantized.named_parameters() if "layers" in name and p.ndim == 2)
    quantize_model(quantized, AwqOffloadConfig(n_grid=0, clip=False, rounding="nearest", backend=options.backend))
    models["w4 in bf16"] = quantized
    models["w4 in fp32"] = copy.deepcopy(quantized).to(torch.float32)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for run in range(4):
        for name, model in models.items():
            tokens = torch.arange(16, device=options.device)[None]
            start = clock()
            model.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            if run:
                seconds[name].append(clock() - start)
    for name in models:
        print(f"{name:12}{NEW_TOKENS / statistics.median(seconds[name]):8.1f} tokens/s")
    linears = [module for module in quantized.modules() if isinstance(module, AwqLinear)]
    resident = sum(parameter.nbytes for linear in linears for parameter in linear.parameters())
    print(f"quantized linears after the first pass: {resident / bf16_bytes:.3f} of their bf16 weights")


def dense_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def describe(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
