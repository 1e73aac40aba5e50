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

from hf_awq_offload.search.feedback_kernel import leaf_kernel

integers = {"start": "i32", "channels": "i32", "rows": "i32", "coupling_stride": "i32", "group_of_channel": "*i64"}
types = integers | {"levels": "fp32", "LEAF": "constexpr", "BLOCK": "constexpr"}
names = leaf_kernel.arg_names
signature = {name: types.get(name, "*fp32") for name in names}
constants = {(names.index("LEAF"),): 16, (names.index("BLOCK"),): 64}
compile(ASTSource(fn=leaf_kernel, signature=signature, constexprs=constants), target=target)
print("compiled", leaf_kernel.__name__)
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
