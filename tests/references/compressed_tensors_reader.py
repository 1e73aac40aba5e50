"""Reads pack-quantized words with the compressed-tensors library."""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from hf_awq_offload.formats.grid import Grid
from hf_awq_offload.formats.pack_quantized import PackQuantizedWeight


def decompress(packed: PackQuantizedWeight, grid: Grid) -> Tensor:
    """Returns the weight as compressed-tensors reads it."""
    from compressed_tensors.compressors import BaseCompressor

    is_channel = grid.group_size == int(packed.weight_shape[1])
    arguments = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=not grid.zero_point,
        strategy="channel" if is_channel else "group",
        group_size=None if is_channel else grid.group_size,
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = {name: tensor for name, tensor in packed._asdict().items() if tensor is not None}
    return compressor.decompress(tensors, QuantizationScheme(targets=["Linear"], weights=arguments))["weight"]
