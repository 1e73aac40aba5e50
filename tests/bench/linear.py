"""Measures speed and memory of the quantized linear against dense ones, and of decoding with it.

    python tests/bench/linear.py [--backend auto] [--runs 15] [--device cpu] [--cpu-time] [--skip-decode]
    python tests/bench/linear.py --crossover [--runs 15] [--cpu-time]
    python tests/bench/linear.py --decoding [--runs 15]                  on a GPU

Times are medians of runs that alternate between the contestants, so that a busy machine hurts all of them alike. The
first table divides the time of dense `F.linear` in bf16 (fp32, fp16) by that of the quantized linear with an input of
the same dtype: above 1 the quantized one is faster. Weights are random; speed does not depend on them. With --cpu-time
(for one thread) it is processor time that is compared, which a machine shared with others leaves alone. --crossover
compares the two ways of the C backend, a fused product and one with dequantized blocks, and torch's int4 kernel; then
dequantizing alone, with the C kernel and with plain torch.

--decoding compares, on a GPU, the backends "triton", "tinygemm" and a dense product in bf16 for few rows: the time of a
call as Python launches it, and inside a CUDA graph, with the bytes of the weight per second, and their share of what a
copy on the same GPU reaches. So many weights take turns that the GPU's cache holds none of them when it is its turn.
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

from hf_awq_offload import AwqLinear, AwqOffloadConfig, ConfigError, quantize_model
from hf_awq_offload.formats.awq import PackedWeight
from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.ops import c_backend, torch_backend

logging.disable_progress_bar()

SHAPES = ((4096, 4096), (11008, 4096))  # out, in
ROWS = (1, 8, 32, 128)
DECODING_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # out, in
DECODING_ROWS = (1, 4, 16)
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
    parser.add_argument("--decoding", action="store_true")
    options = parser.parse_args()
    if options.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time wants OMP_NUM_THREADS=1")
    if options.decoding:
        if not torch.cuda.is_available():
            parser.error("--decoding wants a GPU")
        options.device = "cuda"
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(
        f"{describe(options.device)}, {threads} threads, torch {torch.__version__}, backend {options.backend}, "
        f"{'processor' if options.cpu_time else 'wall'} time"
    )
    if options.crossover or options.decoding:
        crossover(options) if options.crossover else decoding(options)
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


@torch.inference_mode()
def decoding(options: argparse.Namespace) -> None:
    """Prints microseconds and bytes per second of few rows on a GPU, launched by Python and by a CUDA graph."""
    copy_bytes_per_s = bytes_per_s_of_copy(options.runs)
    print(f"a copy reads and writes {copy_bytes_per_s / 1e9:.0f} GB/s")
    for out_features, in_features in DECODING_SHAPES:
        print(f"\n{out_features} × {in_features}, g{GROUP_SIZE}, bf16: µs per call, in a graph, GB/s, share of a copy")
        weights = out_features * in_features
        quantized_bytes = weights // 2 + weights // GROUP_SIZE * 5 // 2  # a group has a scale and a zero point
        for name in ("dense", "triton", "tinygemm"):
            held = 2 * weights if name == "dense" else quantized_bytes
            count = max(2, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // held))
            modules = [module_for(name, out_features, in_features) for _ in range(count)]
            for rows in DECODING_ROWS:
                x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
                try:
                    launched, replayed = us_per_call(modules, x, options.runs)
                except ConfigError as error:
                    print(f"{name:10} {error}")
                    break
                per_s = held / replayed * 1e6
                share = per_s / copy_bytes_per_s
                print(f"{name:10} M={rows:<3}{launched:8.1f}{replayed:8.1f}{per_s / 1e9:8.0f}{share:8.2f}", flush=True)


def module_for(name: str, out_features: int, in_features: int) -> nn.Module:
    if name == "dense":
        return nn.Linear(in_features, out_features, bias=False, device="cuda", dtype=torch.bfloat16)
    return random_linear(out_features, in_features, "cuda", name)


def us_per_call(modules: list[nn.Module], x: Tensor, runs: int) -> tuple[float, float]:
    """Returns the microseconds of one call, launched by Python and by a CUDA graph; the modules take turns."""

    def all_of_them() -> None:
        for module in modules:
            module(x)

    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return tuple(seconds_on_gpu(run, runs) * 1e6 / len(modules) for run in (all_of_them, graph.replay))


def bytes_per_s_of_copy(runs: int) -> float:
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_on_gpu(lambda: target.copy_(source), runs)


def seconds_on_gpu(run: Callable[[], object], runs: int) -> float:
    """Returns the median time between two events around a run."""
    seconds = []
    for i in range(runs + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


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
