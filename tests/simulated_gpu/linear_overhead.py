"""Counts the kernels that one call of a quantized linear launches on a GPU, and measures its Python part.

    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/simulated_gpu/linear_overhead.py [--calls 3000] [--out 64]

The GPU is simulated (docs/gpu.md), and Triton's kernels do nothing here, so that what remains is the processor time of
one call, without Triton's own launch, the smallest of several runs. Operators of torch compute on the CPU and count as
well, so the linear is small.
"""

from __future__ import annotations

import argparse
import time

import simulated_gpu

REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--out", type=int, default=64)
    parser.add_argument("--in", type=int, default=512, dest="in_")
    options = parser.parse_args()
    simulated_gpu.start()
    simulated_gpu.add_project_to_path()

    import torch
    from bench.linear import random_linear

    from hf_awq_offload.ops import triton_kernels
    from simulated_gpu import observed, triton_stand_ins

    triton_stand_ins.install()
    linear = random_linear(options.out, options.in_, "cuda", "triton")
    with_bias = random_linear(options.out, options.in_, "cuda", "triton", bias=True)
    inputs = {rows: torch.randn(rows, options.in_, device="cuda", dtype=torch.bfloat16) for rows in (1, 16)}
    with torch.inference_mode():
        for rows, x in inputs.items():
            for name, module in (("", linear), (", with a bias", with_bias)):
                module(x)
                observed.reset_counters()
                module(x)
                launches = {key: count for key, count in observed.launches_by_operation().items() if count}
                print(f"M={rows}{name}: {sum(launches.values())} launches, {launches}")
        for name in ("gemv_kernel", "gemm_kernel"):
            setattr(triton_kernels, name, Nothing())
        for rows, x in inputs.items():
            print(f"M={rows}: {us_per_call(lambda x=x: linear(x), options.calls):.1f} µs of Python per call")


class Nothing:
    """Is launched as a kernel is, and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Nothing:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        pass


def us_per_call(call, calls: int) -> float:
    times_us = []
    for _ in range(REPEATS):
        start = time.thread_time()
        for _ in range(calls):
            call()
        times_us.append((time.thread_time() - start) * 1e6 / calls)
    return min(times_us)


if __name__ == "__main__":
    main()
