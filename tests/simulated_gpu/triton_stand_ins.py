"""Stand-ins for the product's Triton kernels: launched and checked as those are, computed by torch on the CPU.

Only the kernels are replaced. What launches them is the product's own code, with its grids, strides and scratch memory.
`tests/ops` and `tests/search` compare the kernels themselves with references, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .observed import count_launch, cpu_alias

LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
"""Arguments of a launch that are none of the kernel's."""


class KernelStandIn:
    """Is called as a Triton kernel is: `kernel[grid](*arguments, **constants)`.

    Args:
        name: for counters and messages.
        compute: gets the grid and the arguments, tensors as CPU tensors on the same memory.
        writes: positions of the tensors that the kernel writes; it may read them as well.
    """

    def __init__(self, name: str, compute: Callable[..., None], writes: tuple[int, ...]):
        self.name, self.compute, self.writes = name, compute, writes

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            tensors = {index: value for index, value in enumerate(arguments) if isinstance(value, Tensor)}
            device = torch.cuda.current_device()
            for index, tensor in tensors.items():
                if tensor.device != torch.device("cuda", device):
                    raise ValueError(
                        f"Pointer argument (at {index}) cannot be accessed from Triton: {self.name} is launched on the "
                        f"current device cuda:{device}, the tensor is on {tensor.device}"
                    )
            if not all(0 < blocks < 2**31 for blocks in grid) or any(blocks >= 2**16 for blocks in grid[1:]):
                raise ValueError(f"{self.name}: CUDA does not launch a grid of {grid}")
            count_launch(
                self.name, list(tensors.values()), [tensor for i, tensor in tensors.items() if i in self.writes], device
            )
            constants = {name: value for name, value in constants.items() if name not in LAUNCH_OPTIONS}
            with torch.no_grad():
                self.compute(grid, *(cpu_alias(a) if isinstance(a, Tensor) else a for a in arguments), **constants)

        return launch


def _as_the_kernel_sees(tensor: Tensor, *sizes: int) -> Tensor:
    """Returns the memory from the tensor's start as a contiguous tensor: a kernel gets a pointer, not strides."""
    return tensor.as_strided(sizes, [_product(sizes[i + 1 :]) for i in range(len(sizes))])


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


def _block(grid, remaining, errors, squares, scale, zero, group_of_channel, coupling, pivots, block, stop, rows,
           coupling_stride, levels, *, BLOCK, INNER, ROWS):  # fmt: skip
    from hf_awq_offload.search.feedback import _round_one_by_one
    from hf_awq_offload.search.feedback_state import FeedbackState

    assert grid[0] * ROWS >= rows
    assert 0 < stop - block * BLOCK <= BLOCK
    total, groups = remaining.shape[0], scale.shape[0]
    state = FeedbackState(
        _as_the_kernel_sees(remaining, total, rows), _as_the_kernel_sees(errors, total, rows), squares,
        _as_the_kernel_sees(scale, groups, rows), _as_the_kernel_sees(zero, groups, rows),
        group_of_channel, coupling.as_strided(coupling.shape, (coupling_stride, 1)), pivots,
    )  # fmt: skip
    _round_one_by_one(state, block * BLOCK, stop, int(levels))


def _weight(
    qweight: Tensor,  # (K, N / 8)
    qzeros: Tensor,  # (n, N / 8)
    scales: Tensor,  # (n, N)
    in_features: int,
    out_features: int,
    group_size: int,
) -> Tensor:
    """Returns Wᵀ, (K, N) fp32."""
    from hf_awq_offload.formats.awq import unpack_columns

    groups, words = in_features // group_size, out_features // 8
    codes = unpack_columns(_as_the_kernel_sees(qweight, in_features, words)).float()
    zeros = unpack_columns(_as_the_kernel_sees(qzeros, groups, words)).float().repeat_interleave(group_size, 0)
    scale = _as_the_kernel_sees(scales, groups, out_features).float().repeat_interleave(group_size, 0)
    return (codes - zeros) * scale


def _dequantize(grid, qweight, qzeros, scales, weight, K, row_words, *, K_GROUP, BLOCK_K, WORDS):
    assert grid[0] * WORDS >= row_words
    assert grid[1] * BLOCK_K == K
    N = row_words * 8
    _as_the_kernel_sees(weight, N, K).copy_(_weight(qweight, qzeros, scales, K, N, K_GROUP).t())


def _gemv(grid, x, qweight, qzeros, scales, bias, output, row_words, segments, *, HAS_BIAS, K_GROUP, STEPS, LANES,
          SEGMENTS, WORDS):  # fmt: skip
    assert grid[0] * WORDS >= row_words
    assert K_GROUP % (STEPS * LANES) == 0
    N, K = row_words * 8, segments * STEPS * LANES
    weight = _weight(qweight, qzeros, scales, K, N, K_GROUP)
    _write_product(_as_the_kernel_sees(x, 1, K), weight, bias if HAS_BIAS else None, output)


def _gemm(grid, x, qweight, qzeros, scales, bias, output, M, row_words, segments, stride_xm, *, HAS_BIAS, UPCAST,
          K_GROUP, BLOCK_M, BLOCK_K, SEGMENTS, WORDS):  # fmt: skip
    assert grid[0] * WORDS >= row_words
    assert grid[1] * BLOCK_M >= M
    assert K_GROUP % BLOCK_K == 0
    N, K = row_words * 8, segments * BLOCK_K
    weight = _weight(qweight, qzeros, scales, K, N, K_GROUP)
    _write_product(x.as_strided((M, K), (stride_xm, 1)), weight, bias if HAS_BIAS else None, output)


def _write_product(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (K, N) fp32
    bias: Tensor | None,  # (N,)
    output: Tensor,  # (M, N), contiguous
) -> None:
    product = x.float() @ weight
    if bias is not None:
        product += _as_the_kernel_sees(bias, weight.shape[1]).float()
    _as_the_kernel_sees(output, len(x), weight.shape[1]).copy_(product)


def install() -> None:
    """Replaces the kernels of the product, which must be importable; does nothing where Triton is not installed."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return
    from hf_awq_offload.ops import triton_kernels
    from hf_awq_offload.search import feedback_kernel
    from hf_awq_offload.triton_trial import kernel

    kernel.trial_kernel = KernelStandIn("trial_kernel", lambda grid, target, *, VALUE: target.fill_(VALUE), writes=(0,))
    feedback_kernel.block_kernel = KernelStandIn("block_kernel", _block, writes=(0, 1, 2))
    triton_kernels.dequantize_kernel = KernelStandIn("dequantize_kernel", _dequantize, writes=(3,))
    triton_kernels.gemv_kernel = KernelStandIn("gemv_kernel", _gemv, writes=(5,))
    triton_kernels.gemm_kernel = KernelStandIn("gemm_kernel", _gemm, writes=(5,))
