"""NVFP4 and MXFP4 linears: two fp4 (E2M1) in each byte, the first in the lower half, and a scale for 16 or 32 of them.

    made by                tensors                                             w
    modelopt, NVFP4        weight         (out, in / 2)     uint8              (Δ · Δ₂) · q in fp32
                           weight_scale   (out, in / 16)    float8_e4m3fn
                           weight_scale_2, one value        float32
    compressed-tensors,    weight_packed  (out, in / 2)     uint8              (Δ / Δ₂) · q in fp32, rounded to bf16
    nvfp4-pack-quantized   weight_scale   (out, in / 16)    float8_e4m3fn
                           weight_global_scale, one value   float32
    compressed-tensors,    weight_packed  (out, in / 2)     uint8              2^(e - 127) · q in bf16
    mxfp4-pack-quantized   weight_scale   (out, in / 32)    uint8, e

Sources: modelopt `NVFP4QTensor.dequantize`; compressed-tensors 0.20 `NVFP4PackedCompressor` and
`MXFP4PackedCompressor`, whose order of roundings is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .records import Claims, Recognized, Stored, StoredHeader, StoredWeight, contradicts, described, unsupported
from .scaling import EXPONENT_BIAS, unpack_fp4

MX_GROUP = 32
GLOBAL_SCALE = ("F32", "BF16", "F16")


def claim_modelopt_nvfp4(stored: Stored, claims: Claims) -> None:
    """Recognizes modelopt's NVFP4 linears: a `weight` in bytes beside `weight_scale_2`."""
    for name, header in stored.headers.items():
        prefix, _, last = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        if last != "weight" or header.dtype != "U8" or f"{dot}weight_scale_2" not in stored.headers:
            continue
        scale, second = f"{dot}weight_scale", f"{dot}weight_scale_2"
        stored.require(name, name, ["U8"])
        _require_one_value(stored, second, name)
        shape = _grouped_shape(name, header, stored.require(scale, name, ["F8_E4M3"]))
        parts = {"weight": name, "scale": scale, "second_scale": second}
        weight = StoredWeight(name, parts, shape, torch.float32, _dequantize_modelopt)
        claims.recognized.append(Recognized(weight, "nvfp4", 4))


def recognize_packed(
    stored: Stored,
    dot: str,  # the linear's name and a dot
) -> Recognized:
    """Recognizes a linear of compressed-tensors whose `weight_packed` is in bytes."""
    name, scale, second = f"{dot}weight_packed", f"{dot}weight_scale", f"{dot}weight_global_scale"
    packed = stored.require(name, name, ["U8"], 2)
    scales = stored.require(scale, name, ["F8_E4M3", "U8"], 2)
    virtual = f"{dot}weight"
    if f"{dot}weight_zero_point" in stored.headers:
        unsupported(f"{virtual} is fp4 and has zero points")
    if scales.dtype == "U8":
        rows, columns = packed.shape
        if (
            tuple(scales.shape) == (rows, 4 * columns // 3 // MX_GROUP)
            and 3 * MX_GROUP * scales.shape[1] == 4 * columns
        ):
            unsupported(f"{virtual} is mxfp6")
        if second in stored.headers:
            contradicts(f"{name} has exponents as scales and {second}", "one of them")
        shape = _grouped_shape(name, packed, scales, MX_GROUP)
        weight = StoredWeight(virtual, {"weight": name, "scale": scale}, shape, torch.bfloat16, _dequantize_mxfp4)
        return Recognized(weight, "mxfp4", 4)
    _require_one_value(stored, second, name)
    shape = _grouped_shape(name, packed, scales)
    parts = {"weight": name, "scale": scale, "second_scale": second}
    return Recognized(StoredWeight(virtual, parts, shape, torch.bfloat16, _dequantize_nvfp4), "nvfp4", 4)


def _require_one_value(stored: Stored, name: str, owner: str) -> None:
    header = stored.require(name, owner, GLOBAL_SCALE)
    if any(size != 1 for size in header.shape):
        contradicts(f"{name} is {described(header)}", "one value")


def _grouped_shape(
    name: str, packed: StoredHeader, scales: StoredHeader, group_size: int | None = None
) -> tuple[int, ...]:
    """Shape in full precision; each row is whole groups, one for each scale."""
    if len(packed.shape) < 2:
        contradicts(f"{name} is {described(packed)}", "two dimensions")
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if tuple(scales.shape[:-1]) != shape[:-1] or shape[-1] % scales.shape[-1]:
        contradicts(f"the scales of {name} are {described(scales)}, and it holds {shape} values", "one for each group")
    if group_size is not None and shape[-1] != group_size * scales.shape[-1]:
        contradicts(
            f"the scales of {name} are {described(scales)}, and it holds {shape} values", f"one for {group_size} values"
        )
    return shape


def _times(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiplies groups of the last dimension by (…, n, 1) scales, in the scales' dtype."""
    groups = weight.to(scale.dtype).unflatten(-1, (scale.shape[-2], -1))
    return groups.mul_(scale).flatten(-2)


def _dequantize_modelopt(parts: Mapping[str, Tensor]) -> Tensor:
    scale = parts["scale"].to(torch.float32) * parts["second_scale"].to(torch.float32).reshape(())
    return _times(unpack_fp4(parts["weight"]), scale.unsqueeze(-1))


def _dequantize_nvfp4(parts: Mapping[str, Tensor]) -> Tensor:
    # A second scale without dimensions leaves the quotient in bf16, one of shape (1,) lifts it to fp32.
    scale = parts["scale"].to(torch.bfloat16).unsqueeze(-1) / parts["second_scale"]
    return _times(unpack_fp4(parts["weight"]), scale).to(torch.bfloat16)


def _dequantize_mxfp4(parts: Mapping[str, Tensor]) -> Tensor:
    return _times(unpack_fp4(parts["weight"]), exponential(parts["scale"]).unsqueeze(-1))


def exponential(
    exponents: Tensor,  # uint8
) -> Tensor:
    """2^(e - 127) in bf16, as compressed-tensors' `decompress_mx_scale` computes it."""
    return 2.0 ** (exponents.to(torch.int32) - EXPONENT_BIAS).to(torch.bfloat16)
