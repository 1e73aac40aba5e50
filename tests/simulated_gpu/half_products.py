"""Stand-ins for torch's products of half-precision matrices into fp32 (`out_dtype`), which a CPU build lacks.

They are kernels of the CPU: the simulated GPU runs these on its own memory, and counts one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _addmm_out(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    if not out_dtype == total.dtype == out.dtype == torch.float32 or left.dtype != right.dtype:
        raise RuntimeError(f"addmm into {out_dtype} takes fp32 sums, not {total.dtype} and {out.dtype}")
    return torch.addmm(total, left.float(), right.float(), beta=beta, alpha=alpha, out=out)


def _mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype != torch.float32 or left.dtype != right.dtype:
        raise RuntimeError(f"mm into {out_dtype}: the stand-in knows fp32 only")
    return left.float() @ right.float()


_library: torch.library.Library | None = None


def install() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("addmm.dtype_out", _addmm_out, "CPU")
    _library.impl("mm.dtype", _mm, "CPU")
