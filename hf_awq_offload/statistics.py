"""Sufficient statistics of a linear's input.

For a weight W (out, in) and inputs X (tokens, in), the mean squared output error of any replacement Ŵ needs X only
through its gram matrix (docs/design/001-sufficient-statistics.md):

    ‖X (Ŵ - W)ᵀ‖² / tokens = tr( D G Dᵀ ),   D = Ŵ - W,   G = XᵀX / tokens

One forward pass collects G; scale search, clip search and rounding never see an activation again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import NumericalError

BLOCK_CHANNELS = 512


@dataclass(frozen=True)
class InputStatistics:
    """Second moments and mean magnitudes of one linear input over all counted calibration tokens."""

    gram: Tensor  # (in, in) fp32, XᵀX / tokens
    mean_abs: Tensor  # (in,) fp32, mean |X| per channel
    tokens: int

    def divided(
        self,
        scale: Tensor,  # (in,)
    ) -> InputStatistics:
        """The statistics of X / scale, what a linear sees once `scale` is folded into what produces X."""
        return InputStatistics(self.gram / torch.outer(scale, scale), self.mean_abs / scale, self.tokens)

    def to(self, device: torch.device) -> InputStatistics:
        """The same on `device`."""
        return InputStatistics(self.gram.to(device), self.mean_abs.to(device), self.tokens)


def pooled(statistics: Sequence[InputStatistics]) -> InputStatistics:
    """The statistics over the tokens of all together; of inputs of equal width, not empty."""
    tokens = sum(each.tokens for each in statistics)
    gram, mean_abs = torch.zeros_like(statistics[0].gram), torch.zeros_like(statistics[0].mean_abs)
    for each in statistics:
        gram += each.gram * (each.tokens / max(tokens, 1))
        mean_abs += each.mean_abs * (each.tokens / max(tokens, 1))
    return InputStatistics(gram, mean_abs, tokens)


def blended(own: InputStatistics, pool: InputStatistics, min_tokens: int) -> InputStatistics:
    """`own`, or where it counts fewer than `min_tokens` tokens, filled up to so many from `pool`."""
    if own.tokens >= min_tokens:
        return own
    share = own.tokens / min_tokens
    gram = own.gram * share + pool.gram * (1 - share)
    return InputStatistics(gram, own.mean_abs * share + pool.mean_abs * (1 - share), min_tokens)


class StatisticsCollector:
    """Accumulates `InputStatistics` for named inputs while a decoder layer runs.

    Args:
        inputs: name of an input -> the linear whose input it is.
        device: where the sums live.
    """

    def __init__(self, inputs: Mapping[str, nn.Linear], device: torch.device):
        self.inputs = inputs
        self.sums = {
            name: (
                torch.zeros(linear.in_features, linear.in_features, device=device),
                torch.zeros(linear.in_features, device=device),
            )
            for name, linear in inputs.items()
        }
        self.tokens = dict.fromkeys(inputs, 0)
        self.counted: Tensor | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect from every forward pass inside the context."""
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self.inputs.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def count_only(
        self,
        counted: Tensor | None,  # (batch, tokens) bool
    ) -> None:
        """Which tokens of the batch that comes next enter the statistics; None means all of them."""
        self.counted = counted

    def take(self, name: str, layer_name: str, may_be_empty: bool = False) -> InputStatistics:
        """The statistics of one input, zeros if no token reached it; its sums are given up for them.

        `layer_name` is for the error only.

        Raises:
            NumericalError: activations were NaN or infinite, or no token reached an input that may not be empty.
        """
        tokens = self.tokens[name]
        gram, abs_sum = self.sums.pop(name)
        if tokens == 0 and may_be_empty:
            return InputStatistics(gram, abs_sum, 0)
        if tokens == 0:
            raise NumericalError(f"No calibration token reached {layer_name}.{name}; give more calibration data.")
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise NumericalError(
                f"The input of {layer_name}.{name} holds NaN or infinite values on the calibration data. Load the "
                "model in a wider dtype (dtype=torch.bfloat16 or torch.float32), or check its weights."
            )
        mirror_upper(gram)
        return InputStatistics(gram.div_(tokens), abs_sum.div_(tokens), tokens)

    def _hook(self, name: str):
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _counted_rows(args[0], self.counted)
            gram, abs_sum = self.sums[name]
            with exact_on_matrix_units(rows.dtype, rows.device):
                rows = rows.float()
                if _are_together(gram, rows):
                    add_gram(gram, rows)
                else:  # the product where the layer is, the sum where there is room for all of them
                    product = torch.zeros_like(gram, device=rows.device)
                    add_gram(product, rows)
                    gram.add_(product.to(gram.device))
            abs_sum.add_(rows.abs().sum(dim=0).to(abs_sum.device))
            self.tokens[name] += rows.shape[0]

        return add


def _are_together(tensor: Tensor, other: Tensor) -> bool:
    return tensor.device == other.device


@contextmanager
def exact_on_matrix_units(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, fp32 products of numbers that were of `dtype` may run on matrix units, which lose nothing of them.

    TF32 has the 10 bits of an fp16 or bf16 mantissa, AMX multiplies bf16; both add up in fp32.
    """
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        backend, precision = torch.backends.cuda.matmul, "tf32"
    elif device.type == "cpu" and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        backend, precision = cast(Any, torch.backends).mkldnn.matmul, "bf16"
    else:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def add_gram(
    gram: Tensor,  # (in, in) fp32
    rows: Tensor,  # (tokens, in) fp32
) -> None:
    """gram += XᵀX in the blocks on and above the diagonal: little more than half of the products."""
    for start in range(0, gram.shape[0], BLOCK_CHANNELS):
        gram[start : start + BLOCK_CHANNELS, start:].addmm_(
            rows[:, start : start + BLOCK_CHANNELS].t(), rows[:, start:]
        )


def mirror_upper(
    gram: Tensor,  # (in, in)
) -> None:
    """Fill the blocks below the diagonal, in place, from those above."""
    for start in range(0, gram.shape[0], BLOCK_CHANNELS):
        stop = start + BLOCK_CHANNELS
        gram[stop:, start:stop] = gram[start:stop, stop:].t()


def _counted_rows(
    x: Tensor,  # (..., in)
    counted: Tensor | None,  # (batch, tokens) bool
) -> Tensor:
    """Inputs of the counted tokens, (tokens, in). Inputs that are not one row per token are taken whole."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if counted is not None and rows.shape[0] == counted.numel():
        rows = rows[counted.reshape(-1).to(rows.device)]
    return rows
