"""The class of quantized linear for each checkpoint format."""

from __future__ import annotations

from .awq_linear import AwqLinear
from .packed_linear import PackedLinear
from .quantized_linear import QuantizedLinear


def linear_class(
    checkpoint_format: str,  # "awq" or "compressed-tensors"
) -> type[QuantizedLinear]:
    """The class that holds the tensors of the format."""
    return {"awq": AwqLinear, "compressed-tensors": PackedLinear}[checkpoint_format]
