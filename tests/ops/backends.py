"""Lists the backends that this machine can test: triton runs in its interpreter if there is no GPU (conftest.py)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm GPU")

DEVICE = {"torch": "cpu", "c": "cpu", "cpu": "cpu", "triton": "cuda" if HAS_GPU else "cpu", "tinygemm": "cuda"}
"""Where a backend is tested."""

BACKENDS = pytest.mark.parametrize(
    "backend",
    ["torch", "c", "cpu", pytest.param("triton", marks=needs_triton), pytest.param("tinygemm", marks=needs_gpu)],
)
