"""compressed-tensors: integers packed in words, int8, 8-bit floats, NVFP4 and MXFP4, mixed as its config_groups say.

    format                      tensors of P                                           w, in the dtype of Δ
    pack-quantized              weight_packed int32, weight_scale, weight_shape,       (q - z) · Δ
                                maybe weight_zero_point int32, weight_g_idx
    int-, naive-quantized       weight int8, weight_scale, maybe weight_zero_point     (q - z) · Δ
    float-, naive-quantized     weight float8, weight_scale                            q · Δ
    mxfp8-quantized             weight float8, weight_scale uint8                      q · 2^(e - 127) in bf16
    nvfp4-, mxfp4-pack-…        weight_packed uint8, …                                 float4.py

The tensors themselves say which format and how many bits a linear has: the names in config_groups are those of modules
in the model that was quantized, which may differ from the names in the checkpoint. The config says which combinations
there are at all; a linear that fits none of them contradicts it.

Source: compressed-tensors 0.20 (`compressors/`, `quantization/lifecycle/forward_helpers.py`), with which transformers'
`CompressedTensorsDequantize` decompresses. `weight_g_idx`, from before 0.18, has the group of each input channel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import DTYPES
from ..name_patterns import matches
from ..pack_quantized import unpack_stream, unpack_zeros, words_for
from .float4 import exponential, recognize_packed
from .integers import dequantize_rows_in_chunks, groups_of
from .records import (
    FLOAT8,
    FLOATS,
    Claims,
    Recognized,
    Stored,
    StoredWeight,
    contradicts,
    described,
    unsupported,
    value_of,
)
from .scaling import Block, ScaleGrid, dequantize_scaled, scale_grid

FORMATS = {
    *("dense", "mixed-precision", "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"),
    *("mxfp8-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
}
MAX_BITS = 8


class Scheme(NamedTuple):
    """How a config group quantizes weights."""

    targets: tuple[str, ...]
    bits: int
    is_int: bool
    symmetric: bool
    block: Block | None  # of the strategies "block" and "group"


def claim_compressed_tensors(stored: Stored, claims: Claims) -> None:
    """Recognizes every linear of compressed-tensors.

    Raises:
        CheckpointError: a format that this package can't read, or tensors that contradict each other or the config.
    """
    schemes = _schemes(stored.fields)
    for name, header in stored.headers.items():
        prefix, _, last = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        if last == "weight_packed":
            if header.dtype == "U8":
                claims.recognized.append(recognize_packed(stored, dot))
            else:
                claims.recognized.append(_packed_integers(stored, dot, schemes))
                claims.unused[f"{dot}weight_shape"] = None
        elif last == "weight" and header.dtype in ("I8", *FLOAT8):
            claims.recognized.append(_scaled(stored, dot, schemes))


def _schemes(fields: Mapping[str, Any]) -> list[Scheme]:
    sparsity = value_of(fields, "sparsity_config", Mapping, {})
    if sparsity.get("format") not in (None, "dense"):
        unsupported(f"its weights are sparse ({sparsity.get('format')!r})")
    if fields.get("transform_config"):
        unsupported("it has a transform_config: rotations that belong to the weights")
    schemes = []
    groups = value_of(fields, "config_groups", Mapping, {})
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            contradicts(f"config_groups[{name!r}] in the quantization_config is {group!r}", "a dict")
        layout = value_of(group, "format", str, value_of(fields, "format", str, "dense"))
        if layout not in FORMATS:
            unsupported(f"the format of its config group {name} is {layout!r}")
        weights = value_of(group, "weights", Mapping, {})
        if not weights:
            continue
        bits = value_of(weights, "num_bits", int, 8)
        targets = value_of(group, "targets", (list, tuple), ())
        if not all(isinstance(target, str) for target in targets):
            contradicts(f"the targets of config group {name} are {targets!r}", "names and patterns")
        kind = value_of(weights, "type", str, "int").lower()
        schemes.append(
            Scheme(tuple(targets), bits, kind == "int", bool(weights.get("symmetric", True)), _block_of(weights))
        )
    return schemes


def _block_of(weights: Mapping[str, Any]) -> Block | None:
    block = weights.get("block_structure")
    if isinstance(block, str):  # "128x128" in old configs
        block = [int(part) if part.isdecimal() else 0 for part in block.split("x")]
    if block is None:
        size = value_of(weights, "group_size", int, 0)
        return (1, size) if size > 0 else None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        contradicts(f"block_structure in the quantization_config is {block!r}", "two positive numbers")
    return (block[0], block[1])


def _scaled(stored: Stored, dot: str, schemes: Sequence[Scheme]) -> Recognized:
    """Recognizes a linear whose weight has one value in a byte."""
    name, scale, zero = f"{dot}weight", f"{dot}weight_scale", f"{dot}weight_zero_point"
    weight = stored.require(name, name, ["I8", *FLOAT8])
    is_int = weight.dtype == "I8"
    scales = stored.require(scale, name, FLOATS if is_int else (*FLOATS, "U8", "F8_E8M0"))
    blocks = [scheme.block for scheme in schemes if scheme.block is not None and scheme.is_int == is_int]
    grid = scale_grid(name, tuple(weight.shape), scales, blocks)
    dtype = DTYPES[scales.dtype] if scales.dtype in FLOATS else torch.bfloat16
    parts = {"weight": name, "scale": scale}
    if _has_zeros(stored, name, zero, [scheme for scheme in schemes if scheme.is_int == is_int]):
        zeros = stored.require(zero, name, [weight.dtype])
        if tuple(zeros.shape) != tuple(scales.shape):
            contradicts(f"{zero} is {described(zeros)}, and {scale} is {described(scales)}", "equal shapes")
        parts["zero"] = zero
    dequantize = partial(_dequantize_scaled, grid=grid, dtype=dtype)
    kind = "int8" if is_int else "fp8"
    record = StoredWeight(name, parts, tuple(weight.shape), dtype, dequantize)
    return Recognized(record, f"compressed-tensors {kind} ({grid.label()})", 8)


def _dequantize_scaled(parts: Mapping[str, Tensor], grid: ScaleGrid, dtype: torch.dtype) -> Tensor:
    if parts["scale"].dtype == torch.uint8:
        parts = {**parts, "scale": exponential(parts["scale"])}
    # Unlike transformers' fp8, the library computes in the dtype of the scales.
    return dequantize_scaled({**parts, "scale": parts["scale"].to(dtype)}, grid, dtype)


def _packed_integers(stored: Stored, dot: str, schemes: Sequence[Scheme]) -> Recognized:
    """Recognizes a linear of format pack-quantized, or a stack of such."""
    name, scale, zero, g_idx = (
        f"{dot}{last}" for last in ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    )
    packed = stored.require(name, name, ["I32"])
    shape = _shape_of(stored, dot, packed.shape)
    bits = _bits_of(name, dot, shape[-1], packed.shape[-1], schemes)
    scales = stored.require(scale, name, FLOATS)
    aligned = tuple(scales.shape) if len(scales.shape) == len(shape) else (1,) * len(shape)
    is_per_tensor = all(size == 1 for size in scales.shape)
    n = aligned[-1]
    if not is_per_tensor and (aligned[:-1] != shape[:-1] or (g_idx not in stored.headers and shape[-1] % n)):
        contradicts(f"{scale} is {described(scales)}, and {dot}weight is {shape}", "a scale for each group of a row")
    parts = {"weight": name, "scale": scale}
    if _has_zeros(stored, name, zero, [scheme for scheme in schemes if scheme.is_int and scheme.bits == bits]):
        zeros = stored.require(zero, name, ["I32"])
        expected = (*shape[:-2], words_for(shape[-2], bits), n)
        if tuple(zeros.shape) != expected:
            contradicts(f"{zero} is {described(zeros)}", f"I32 of {expected}")
        parts["zero"] = zero
    if g_idx in stored.headers:
        order = stored.require(g_idx, name, ["I32", "I64"], 1)
        if len(shape) != 2 or tuple(order.shape) != shape[-1:] or shape[-1] % n:
            contradicts(f"{g_idx} is {described(order)}, and {dot}weight is {shape}", "a group for each input channel")
        parts["g_idx"] = g_idx
    dtype = DTYPES[scales.dtype]
    dequantize = partial(_dequantize_packed, shape=shape, bits=bits, name=g_idx)
    weight = StoredWeight(f"{dot}weight", parts, shape, dtype, dequantize)
    return Recognized(weight, f"compressed-tensors, {bits} bits", bits)


def _shape_of(stored: Stored, dot: str, packed: Sequence[int]) -> tuple[int, ...]:
    """Shape in full precision, from weight_shape."""
    name = f"{dot}weight_shape"
    header = stored.require(name, f"{dot}weight_packed", ["I64", "I32"], 1)
    if len(packed) not in (2, 3) or header.shape[0] != len(packed):
        contradicts(f"{name} is {described(header)}, and {dot}weight_packed is {tuple(packed)}", "a size for each")
    shape = tuple(int(size) for size in stored.read(name).flatten().tolist())
    if shape[:-1] != tuple(packed[:-1]) or shape[-1] < 1:
        contradicts(
            f"{name} ({described(header)}) says {shape}, and {dot}weight_packed is {tuple(packed)}", "equal rows"
        )
    return shape


def _bits_of(name: str, dot: str, in_features: int, words: int, schemes: Sequence[Scheme]) -> int:
    """The number of bits with which a row has as many words; the config decides between several."""
    fitting = {bits for bits in range(1, MAX_BITS + 1) if words_for(in_features, bits) == words}
    integers = [scheme for scheme in schemes if scheme.is_int]
    said = {scheme.bits for scheme in integers}
    possible = fitting & said if said else fitting
    if len(possible) > 1:
        prefix = dot.removesuffix(".")
        named = {s.bits for s in integers if any(_matches(target, prefix) for target in s.targets)} & possible
        possible = named or possible
    if len(possible) != 1:
        unsupported(
            f"{name} has {words} words for {in_features} values, which fits {sorted(fitting) or 'no number of'} bits, "
            f"and the config says {sorted(said)}; releases of compressed-tensors before 0.18 pack 3, 5, 6 and 7 bits "
            "otherwise"
        )
    return possible.pop()


def _matches(target: str, name: str) -> bool:
    try:
        return matches(target, name)
    except re.error as error:
        contradicts(f"the target {target!r} in the quantization_config is no pattern ({error})", "a regular expression")


def _has_zeros(stored: Stored, owner: str, zero: str, schemes: Sequence[Scheme]) -> bool:
    """Whether a linear has zero points. The config, if it leaves no choice, has to agree."""
    is_there = zero in stored.headers
    if schemes and not is_there and not any(scheme.symmetric for scheme in schemes):
        stored.require(zero, owner, [])
    if schemes and is_there and all(scheme.symmetric for scheme in schemes):
        contradicts(f"{zero} is there, and the quantization_config says symmetric", "symmetric = false")
    return is_there


def _dequantize_packed(parts: Mapping[str, Tensor], shape: tuple[int, ...], bits: int, name: str) -> Tensor:
    packed, scale, zero = parts["weight"], parts["scale"], parts.get("zero")
    if len(shape) == 3:
        if scale.ndim != 3:
            scale = scale.reshape(1, 1, 1).expand(shape[0], 1, 1)
        weight = torch.empty(shape, dtype=scale.dtype)
        for expert in range(shape[0]):
            own = {role: tensor[expert] for role, tensor in {**parts, "scale": scale}.items()}
            weight[expert] = _dequantize_packed(own, shape[1:], bits, name)
        return weight
    rows, columns = shape
    scale = scale.reshape(1, -1).expand(rows, -1) if scale.numel() == 1 else scale
    n = scale.shape[1]
    zeros = unpack_zeros(zero, rows, bits)
    groups = None
    if "g_idx" in parts and not bool((parts["g_idx"] == -1).any()):  # -1: in order
        groups = groups_of(parts["g_idx"], n, name)
        if groups is not None and not bool((groups.bincount(minlength=n) == columns // n).all()):
            contradicts(f"{name} has groups of different sizes", f"{columns // n} input channels in each")
    return dequantize_rows_in_chunks(
        lambda first, last: unpack_stream(packed[first:last], columns, bits),
        (rows, columns),
        scale,
        2 ** (bits - 1) if zeros is None else zeros,
        groups,
        scale.dtype,
    )
