"""Runs `source_format` over tensors in memory, as if they were a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_awq_offload.formats.source import SourceFormat, StoredHeader, source_format

SPELLED = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.float4_e2m1fn_x2: "F4",
}  # fmt: skip


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, StoredHeader]:
    """Headers as safetensors writes them; it counts the values of fp4, torch the bytes."""
    return {name: StoredHeader(SPELLED[tensor.dtype], _stored_shape(tensor)) for name, tensor in tensors.items()}


def _stored_shape(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return (*shape[:-1], 2 * shape[-1]) if shape and tensor.dtype == torch.float4_e2m1fn_x2 else shape


def recognize(tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None) -> SourceFormat | None:
    return source_format(headers_of(tensors), fields, lambda name: tensors[name])


def dequantized(tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Every virtual tensor; what each record says of itself is checked."""
    source = recognize(tensors, fields)
    assert source is not None
    weights = {}
    for weight in source.weights:
        before = {role: tensors[name].clone() for role, name in weight.parts.items()}
        result = weight.dequantize({role: tensors[name] for role, name in weight.parts.items()})
        assert result.shape == weight.shape
        assert result.dtype == weight.dtype
        assert result.is_contiguous()
        for role, name in weight.parts.items():
            assert same_bits(before[role], tensors[name]), f"{name} was changed"
        weights[weight.name] = result
    parts = {name for weight in source.weights for name in weight.parts.values()}
    assert not parts & set(source.unused)
    return weights


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, zeros of both signs and NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (tensor.clone(memory_format=torch.contiguous_format).view(-1) for tensor in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def float8(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Random 8-bit floats of many exponents, without NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-8, 6, shape, generator=generator)
    return values.clamp(-400, 400).to(dtype)


def uniform(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random positive scales."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 1e-3).to(dtype)


def random_bytes(
    shape: tuple[int, ...], seed: int = 2, dtype: torch.dtype = torch.uint8, low: int = 0, high: int = 256
):
    values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    return values.to(torch.uint8).view(dtype)
