"""Collects the statistics of linears' inputs while a decoder layer runs: forward hooks that add up gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from ..messages import shortened
from ..precision import exact_on_matrix_units
from ..search.statistics import InputStatistics
from .counted_rows import CountedRows
from .gram_products import AddProduct, adder_for
from .non_finite import FirstNonFinite

BLOCK_CHANNELS = 512


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
        self._rows = CountedRows(None)
        self._bad = FirstNonFinite()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collects from every forward pass inside the context."""
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self.inputs.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def set_counted_tokens(
        self,
        counted: Tensor | None,  # (batch, tokens) bool
        sequences: Sequence[int] = (),
    ) -> None:
        """Says which tokens of the next batch enter the statistics; None means all of them.

        `sequences` has the number of each of the batch's sequences, for errors.
        """
        self._rows = CountedRows(counted)
        self._bad.begin_batch(counted, sequences)

    def take(self, name: str, layer_name: str, may_be_empty: bool = False) -> InputStatistics:
        """Returns the statistics of one input, zeros if no token reached it, and frees its sums.

        `layer_name` is for the error only.

        Raises:
            NumericalError: activations were NaN, infinite or too large to square in fp32 (beyond 1.8e19), or no token
                reached an input that may not be empty.
        """
        tokens = self.tokens[name]
        gram, abs_sum = self.sums.pop(name)
        if tokens == 0 and may_be_empty:
            return InputStatistics(gram, abs_sum, 0)
        if tokens == 0:
            raise NumericalError(f"No calibration token reached {layer_name}.{name}; give more calibration data.")
        if not bool(torch.isfinite(gram.diagonal()).all()):
            raise NumericalError(
                f"The input of {layer_name}.{name} holds NaN or infinite values, or some whose squares are infinite in "
                f"fp32, {self._where(name)}. Load the model in a wider dtype (dtype=torch.bfloat16 or torch.float32), "
                "leave this data out, or check the weights of the layers before."
            )
        mirror_upper(gram)
        return InputStatistics(gram.div_(tokens), abs_sum.div_(tokens), tokens)

    def _where(self, name: str) -> str:
        """Says on which of the calibration sequences an input was not finite."""
        numbers = self._bad.sequences(name)
        if not numbers:
            return "on the calibration data"
        if len(numbers) == 1:
            return f"first on calibration sequence {numbers[0]} (counted from 0, of those that were chosen)"
        shown = shortened([str(number) for number in numbers], 8)
        return f"first on one of the calibration sequences {shown} (counted from 0, of those that were chosen)"

    def _hook(self, name: str):
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = self._rows.of(args[0])
            gram, abs_sum = self.sums[name]
            add_product = adder_for(rows.dtype, rows.device)
            with exact_on_matrix_units(rows.dtype, rows.device):
                rows = rows.float() if add_product is None else rows
                if _are_together(gram, rows):
                    add_gram(gram, rows, add_product)
                else:  # the product where the layer is, the sum where there is room for all of them
                    product = torch.zeros_like(gram, device=rows.device)
                    add_gram(product, rows, add_product)
                    gram.add_(product.to(gram.device))
            self._bad.watch(name, args[0], rows)
            abs_sum.add_(_abs_sum(rows).to(abs_sum.device))
            self.tokens[name] += rows.shape[0]

        return add


def _are_together(tensor: Tensor, other: Tensor) -> bool:
    return tensor.device == other.device


def add_gram(
    gram: Tensor,  # (in, in) fp32
    rows: Tensor,  # (tokens, in): fp32, or what `add_product` takes
    add_product: AddProduct | None = None,
) -> None:
    """Adds XᵀX to the blocks of `gram` on and above the diagonal: little more than half of the products."""
    for start in range(0, gram.shape[0], BLOCK_CHANNELS):
        block = gram[start : start + BLOCK_CHANNELS, start:]
        factors = rows[:, start : start + BLOCK_CHANNELS].t(), rows[:, start:]
        if add_product is None:
            block.addmm_(*factors)
        else:
            add_product(block, *factors)


def mirror_upper(
    gram: Tensor,  # (in, in)
) -> None:
    """Fills the blocks below the diagonal in place, from those above."""
    for start in range(0, gram.shape[0], BLOCK_CHANNELS):
        stop = start + BLOCK_CHANNELS
        gram[stop:, start:stop] = gram[start:stop, stop:].t()


def _abs_sum(
    rows: Tensor,  # (tokens, in)
) -> Tensor:
    """Returns the sums of absolute values over all tokens, (in,) fp32."""
    if rows.dtype == torch.float32:
        return rows.abs().sum(dim=0)
    return torch.linalg.vector_norm(rows, ord=1, dim=0, dtype=torch.float32)
