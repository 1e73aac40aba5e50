"""Tests, without a GPU, that the Triton kernels compile for NVIDIA and AMD GPUs: the interpreter accepts more code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backends import needs_triton

PROGRAM = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hf_awq_offload.ops import triton_kernels as kernels

backend, arch, warp = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, warp)
packed = {"qweight": "*i32", "qzeros": "*i32", "scales": "*fp16"}
constants = {"K_GROUP": 128, "BLOCK_K": 64, "BLOCK_N": 64, "TILES": 8, "UPCAST": False, "BLOCK_M": 16}
for dtype in ("fp16", "bf16", "fp32"):
    types = packed | {"x": f"*{dtype}", "weight": f"*{dtype}", "partial": "*fp32"}
    for kernel in (kernels.gemm_kernel, kernels.gemv_kernel, kernels.dequantize_kernel):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        values = {(names.index(name),): value for name, value in constants.items() if name in names}
        compile(ASTSource(fn=kernel, signature=signature, constexprs=values), target=target)
        print("compiled", kernel.__name__, dtype)

from hf_awq_offload.search import feedback_kernel

kernel = feedback_kernel.block_kernel
integers = {"block": "i32", "stop": "i32", "rows": "i32", "coupling_stride": "i32", "group_of_channel": "*i64"}
constants = {
    "BLOCK": feedback_kernel.BLOCK_CHANNELS, "INNER": feedback_kernel.INNER_CHANNELS, "ROWS": feedback_kernel.BLOCK_ROWS
}
types = integers | {"levels": "fp32"} | dict.fromkeys(constants, "constexpr")
names = kernel.arg_names
signature = {name: types.get(name, "*fp32") for name in names}
values = {(names.index(name),): value for name, value in constants.items()}
compile(ASTSource(fn=kernel, signature=signature, constexprs=values), target=target, options={"num_warps": 1})
print("compiled", kernel.__name__)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("hip", "gfx942", "64")], ids=str)
def test_every_kernel_compiles_in_every_dtype(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *target], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("compiled") == 10
