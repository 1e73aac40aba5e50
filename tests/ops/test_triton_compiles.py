"""Tests, without a GPU, that the Triton kernels compile for NVIDIA and AMD GPUs: the interpreter accepts more code.

For NVIDIA, the products must also fit a program's registers and a GPU's shared memory, in every shape of tile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from backends import needs_triton

PROGRAM = """
import json, re, subprocess, sys, tempfile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hf_awq_offload.ops import triton_backend as backend, triton_kernels as kernels
from hf_awq_offload.triton_trial import kernel as trial
import torch

kind, arch, warp = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(kind, int(arch) if arch.isdigit() else arch, warp)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ALIGNED = ("row_words", "K", "stride_xm")  # what Triton finds out from most shapes; pointers always are


def build(name, kernel, types, constants, stages=2):
    constants = dict(constants)
    warps = constants.pop("num_warps", 4)
    names = kernel.arg_names
    signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in names}
    values = {(names.index(each),): value for each, value in constants.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(names)
        if signature[each].startswith("*") or each in ALIGNED
    }
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = compile(source, target=target, options=options)
    result = {"kernel": name, "shared": compiled.metadata.shared}
    if kind == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result["registers"], result["spilled"] = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", said).groups())
        result["loads of 16 bytes"] = len(re.findall(r"ld\\.global\\S*\\.v4\\.b32", compiled.asm["ptx"]))
    print(json.dumps(result))


for name, dtype in DTYPES.items():
    packed = {"qweight": "*i32", "qzeros": "*i32", "scales": "*fp16"}
    types = packed | {each: f"*{name}" for each in ("x", "weight", "bias", "output")}
    dequantize = {"K_GROUP": 128, "BLOCK_K": 64, "WORDS": backend.WORDS_TO_DEQUANTIZE}
    build(f"dequantize {name}", kernels.dequantize_kernel, types, dequantize)
    for warps in (backend.WARPS,) if name == "fp32" else (backend.WARPS, 2 * backend.WARPS):
        gemv = {"HAS_BIAS": True, "K_GROUP": 128, "STEPS": 64 // backend.LANES, "LANES": backend.LANES,
                "SEGMENTS": warps, "WORDS": backend.WORDS, "num_warps": warps}
        build(f"gemv {name}, {warps} warps", kernels.gemv_kernel, types, gemv)
    for tile in backend.TILES_OF_FLOATS if dtype == torch.float32 else backend.TILES_OF_HALVES:
        gemm = {"HAS_BIAS": True, "UPCAST": False, "K_GROUP": 128, "BLOCK_M": tile.rows, "BLOCK_K": tile.channels,
                "SEGMENTS": backend.WARPS, "WORDS": backend.WORDS, "num_warps": backend.WARPS}
        build(f"gemm {name} {tile.rows}", kernels.gemm_kernel, types, gemm, stages=3 if kind == "cuda" else 2)

build("trial", trial.trial_kernel, {"target": "*i32"}, {"VALUE": 7})

from hf_awq_offload.search import feedback_kernel

kernel = feedback_kernel.block_kernel
integers = {"block": "i32", "stop": "i32", "rows": "i32", "coupling_stride": "i32", "group_of_channel": "*i64"}
types = dict.fromkeys(kernel.arg_names, "*fp32") | integers | {"levels": "fp32"}
blocks = {"BLOCK": feedback_kernel.BLOCK_CHANNELS, "INNER": feedback_kernel.INNER_CHANNELS,
          "ROWS": feedback_kernel.BLOCK_ROWS}
build("feedback", kernel, types, blocks | {"num_warps": 1})
"""
KERNELS = 18
SHARED_BYTES = {"cuda": 99 * 2**10, "hip": 64 * 2**10}
"""Shared memory of a program: the least of NVIDIA's GPUs from compute capability 8.0 on (8.6), and AMD's."""


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
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES[target[0]], kernel
        assert kernel.get("spilled", 0) == 0, kernel
        if kernel["kernel"].startswith("gemv") and target[0] == "cuda":
            assert kernel["loads of 16 bytes"] >= 2, kernel
