"""Weights in 8-bit floats beside scales, and fp4 packed in bytes as transformers' `fp8` has it.

    weight                   scales, one of                                      made by
    P.weight                 P.weight_scale_inv                                  transformers' fp8, DeepSeek, MiniMax
                             P.weight_scale                                      fbgemm, modelopt, transformers
                             P.scale, P.qscale_weight                            DeepSeek-V4-Flash, Mistral
    P.gate_up_proj (3-D) …   P.gate_up_proj_scale_inv, _scale, _weight_scale     experts fused into one parameter

All of them multiply. Scales are floats or bytes that hold exponents (E8M0). scaling.py says which value has which. The
result is fp32, as transformers' `Fp8Dequantize` computes it before it casts to the model's dtype.

In `fp8`, int8 isn't an integer but two fp4 (E2M1), the first in the lower half; safetensors calls that F4, too.
fbgemm's `down_proj` of fused experts, (E, in, out), has a scale for each output channel, stored as (E, out, 1).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch

from .records import FLOAT8, FLOATS, Claims, Recognized, Stored, StoredHeader, StoredWeight, contradicts, unsupported
from .scaling import Block, ScaleGrid, common_block, dequantize_scaled, scale_grid

SCALES = (*FLOATS, "F8_E8M0", "U8")
FP4, FP4_IN_INT8 = "F4", "I8"


def claim_float8(
    stored: Stored,
    claims: Claims,
    blocks: Collection[Block],  # that the config names
    int8_is_fp4: bool = False,
    transposed_experts: bool = False,  # fbgemm's layout
) -> None:
    """Recognizes every weight in 8-bit floats, and fp4 in bytes.

    Raises:
        CheckpointError: a weight has no scales or several, or their shape doesn't fit.
    """
    dtypes = (*FLOAT8, FP4, *([FP4_IN_INT8] if int8_is_fp4 else []))
    taken = claims.names()
    pairs: dict[str, str] = {}
    missing: list[str] = []
    for name, header in stored.headers.items():
        if header.dtype not in dtypes or name in taken or "scale" in name.rpartition(".")[2]:
            continue
        scale = scale_name(stored, name)
        if scale is not None:
            pairs[name] = scale
        elif header.dtype != FP4_IN_INT8 or name.endswith("weight"):
            missing.append(name)
    if missing:
        _refuse_without_scales(stored, missing, pairs)
    for name, scale in pairs.items():
        stored.require(scale, name, SCALES)
        stored.require(name, name, dtypes)
    if not blocks:
        common = common_block(
            [(_shape_of(stored.headers[n]), tuple(stored.headers[s].shape)) for n, s in pairs.items()]
        )
        blocks = [] if common is None else [common]
    for name, scale in pairs.items():
        claims.recognized.append(_recognize(stored, name, scale, blocks, transposed_experts))


def scale_name(stored: Stored, name: str) -> str | None:
    """The tensor that holds the scales of a weight.

    Raises:
        CheckpointError: there are several such tensors.
    """
    prefix, _, last = name.rpartition(".")
    dot = f"{prefix}." if prefix else ""
    if last == "weight":
        names = [f"{dot}{scale}" for scale in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")]
    else:
        names = [f"{name}{suffix}" for suffix in ("_scale_inv", "_scale", "_weight_scale")]
    found = [scale for scale in names if scale in stored.headers]
    if len(found) > 1:
        contradicts(f"{name} has the scales {' and '.join(found)}", "one tensor of scales")
    return found[0] if found else None


def _refuse_without_scales(stored: Stored, missing: list[str], pairs: dict[str, str]) -> None:
    dtype = stored.headers[missing[0]].dtype
    if pairs:
        other, scale = next(iter(pairs.items()))
        contradicts(
            f"{missing[0]} is {dtype} and has no scales (nor have {len(missing) - 1} others), but {other} has {scale}",
            "scales for every weight",
        )
    unsupported(f"{missing[0]} is {dtype}, and no tensor beside it holds its scales")


def _shape_of(header: StoredHeader) -> tuple[int, ...]:
    """Shape in full precision. safetensors counts values of F4; an int8 holds two of them."""
    shape = tuple(header.shape)
    return (*shape[:-1], 2 * shape[-1]) if header.dtype == FP4_IN_INT8 and shape else shape


def _recognize(
    stored: Stored, name: str, scale: str, blocks: Collection[Block], transposed_experts: bool
) -> Recognized:
    header, scales = stored.headers[name], stored.headers[scale]
    shape, packed = _shape_of(header), header.dtype in (FP4, FP4_IN_INT8)
    if transposed_experts and len(shape) == 3 and tuple(scales.shape) == (shape[0], shape[2], 1):
        grid = ScaleGrid((shape[0], 1, shape[2]), None)
    else:
        grid = scale_grid(name, shape, scales, blocks)
    if packed and (not shape or shape[-1] % 2):
        contradicts(f"{name} holds pairs of fp4 and is {shape}", "an even number of columns")
    dequantize = partial(dequantize_scaled, grid=grid, dtype=torch.float32, packed=packed)
    weight = StoredWeight(name, {"weight": name, "scale": scale}, shape, torch.float32, dequantize)
    kind, bits = ("fp4", 4) if packed else ("fp8", 8)
    return Recognized(weight, f"{kind} ({grid.label()})", bits)
