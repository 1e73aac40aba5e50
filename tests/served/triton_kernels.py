"""Compares vLLM's Triton kernels for AWQ with this package, in Triton's interpreter.

The kernels' file of the installed vLLM runs as it is; `vllm.triton_utils`, which looks for a GPU, is replaced.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language as tl

from hf_awq_offload.formats.awq import pack_weight
from hf_awq_offload.formats.grid import Grid, group_parameters, group_range, quantize
from hf_awq_offload.nn.awq_linear import AwqLinear

FILE = "vllm/model_executor/layers/quantization/awq_triton.py"


def kernels(packages: Path) -> ModuleType:
    """Returns vLLM's module of AWQ kernels from the folder of an environment's packages."""
    replaced = ModuleType("vllm.triton_utils")
    replaced.__dict__.update(tl=tl, triton=triton)
    sys.modules.setdefault("vllm", ModuleType("vllm"))
    sys.modules["vllm.triton_utils"] = replaced
    spec = importlib.util.spec_from_file_location("vllm_awq_triton", packages / FILE)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{packages / FILE} is missing; is this vLLM's environment?")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(vllm: ModuleType, group_size: int) -> tuple[str, bool]:
    """Returns how many weights differ and by how much products do, and whether both are as they should be.

    Weights are to agree to the bit; products add in another order, in fp16.
    """
    generator = torch.Generator().manual_seed(0)
    grid = Grid(4, 256 if group_size == -1 else group_size, True)
    weight = torch.randn(96, 256, generator=generator)
    parameters = group_parameters(group_range(weight, grid), grid)
    packed = pack_weight(quantize(weight, parameters, grid), parameters)
    linear = AwqLinear.from_packed(packed, None, grid, torch.float16)
    read = vllm.awq_dequantize_triton(linear.qweight, linear.scales, linear.qzeros)
    differing = int((linear.weight != read.T).sum())
    x = torch.randn(5, 256, generator=generator).half()
    product = vllm.awq_gemm_triton(x, linear.qweight, linear.scales, linear.qzeros, 1)
    error = float((product - linear(x)).abs().max() / linear(x).abs().max())
    found = f"groups of {group_size}: {differing} of {weight.numel()} weights differ; products differ by {error:.1e}"
    return found, not differing and error < 4e-3


if __name__ == "__main__":
    module = kernels(Path(sys.argv[1]))
    results = [compare(module, group_size) for group_size in (32, 64, 128, -1)]
    print("\n".join(line for line, _ in results))
    sys.exit(not all(agrees for _, agrees in results))
