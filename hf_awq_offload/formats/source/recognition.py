"""The entry: picks the reader for a checkpoint, and checks that no quantized tensor is left over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ...messages import shortened
from ..layouts import COMPRESSED_TENSORS
from .awq import claim_awq
from .bitsandbytes import claim_bitsandbytes
from .compressed_tensors import claim_compressed_tensors
from .float4 import claim_modelopt_nvfp4
from .float8 import claim_float8
from .gptq import claim_gptq
from .mxfp4 import claim_mxfp4
from .records import (
    REMEDY,
    Claims,
    SourceFormat,
    Stored,
    StoredHeader,
    StoredWeight,
    contradicts,
    described,
    unsupported,
)
from .scaling import Block

ACTIVATIONS = re.compile(
    r"input_scale|input_scale_ub|input_global_scale|input_zero_point|output_scale|output_zero_point|activation_scale"
    r"|qscale_act"
)
"""Scales and zero points of activations, after the name of a linear and a dot, or of fused experts and "_"."""
CACHE = re.compile(r"[kv]_(scale|zero_point)|kv_scale")
"""Last part of the name of a scale or zero point of the KV cache."""
ATTENTION = re.compile(r"q_(scale|zero_point)|prob_output_scale")
"""Last part of the name of a scale or zero point that attention may have beside those of the cache."""
REMAINS = re.compile(
    r"(.+_)?scale_inv|weight_scale(_2)?|weight_zero_point|weight_packed|weight_shape|weight_g_idx|weight_global_scale"
    r"|qweight|qzeros|scaled_zeros|qscale_weight|pre_quant_scale|bitsandbytes__\w+|SCB|weight_format"
)
"""Last part of the name of a tensor that only quantized weights have, whatever its dtype."""
PACKED_REMAINS = re.compile(r"scales|g_idx")
"""Last part of the name of a tensor of AWQ or GPTQ. In other checkpoints it may be a parameter in full precision."""
PARTS_OF_WEIGHT = re.compile(r".*weight\.(nested_)?(absmax|quant_map)")
"""Name of a tensor of bitsandbytes."""
EIGHT_BITS = ("I8", "U8")
BUFFER = re.compile(r".*mask.*|(.*_)?(bias|ids?|index|indices|idx|table)")
"""Last part of the name of a buffer that a model in full precision may store in bytes, such as GPT-2's causal mask."""
MAX_LABELS = 3  # in the name of a format, the commonest first
NO_CONFIG, AWQ, GPTQ, BITSANDBYTES, MODELOPT = "none", "awq", "gptq", "bitsandbytes", "modelopt"


def source_format(
    headers: Mapping[str, StoredHeader],  # of every tensor in the checkpoint
    fields: Mapping[str, Any] | None,  # quantization_config or compression_config of config.json
    read: Callable[[str], Tensor],  # one small stored tensor: a shape, a quant state
) -> SourceFormat | None:
    """Recognizes how a checkpoint stores its weights; None if that is full precision.

    Every stored tensor is in the parts of one weight (shared scales: of several), unused, or in full precision.

    Raises:
        CheckpointError: quantized in a way that this package can't read, or tensors contradict each other or the
            config, or a weight lacks its scales, or scales lack their weight.
    """
    if fields is not None and not isinstance(fields, Mapping):
        contradicts(f"the quantization_config is {fields!r}", "a dict")
    for name, header in headers.items():
        if not all(type(size) is int and size >= 0 for size in header.shape):
            contradicts(f"{name} is {described(header)}", "sizes that are not negative")
    stored = Stored(headers, fields or {}, read)
    method = _method(stored.fields)
    claims = Claims()
    _CLAIMS[method](stored, claims)
    is_quantized = bool(claims.recognized) or method != NO_CONFIG
    if is_quantized:
        _claim_unused(stored, claims)
    _refuse_remains(stored, claims, method, is_quantized)
    _refuse_collisions(stored, claims)
    if not claims.recognized:
        return _without_weights(method, claims)
    return _described(claims)


def _method(fields: Mapping[str, Any]) -> str:
    """Key of `_CLAIMS`."""
    if not fields:
        return NO_CONFIG
    method = fields.get("quant_method")
    if method is None:
        keys = {"quant_algo": MODELOPT, "config_groups": COMPRESSED_TENSORS}
        keys |= {"load_in_4bit": BITSANDBYTES, "load_in_8bit": BITSANDBYTES}
        method = next((value for key, value in keys.items() if key in fields), None)
    method = str(getattr(method, "value", method)).lower().replace("_", "-")
    for family in (MODELOPT, BITSANDBYTES):  # "modelopt_fp4", "bitsandbytes_4bit"
        method = family if method.startswith(f"{family}-") else method
    if method not in _CLAIMS or method == NO_CONFIG:
        found = fields.get("quant_method")
        unsupported(
            f"its quant_method is {found!r}" if found is not None else "its quantization_config has no quant_method"
        )
    return method


def _claim_unused(stored: Stored, claims: Claims) -> None:
    """Notes the scales of activations and of the KV cache. A parameter that is only called so is left alone."""
    taken = claims.names()
    owners = {item.weight.name for item in claims.recognized}
    owners |= {name.removesuffix("weight") for name in owners if name.rpartition(".")[2] == "weight"}
    scheme = stored.fields.get("kv_cache_scheme")
    is_per_head = isinstance(scheme, Mapping) and scheme.get("strategy") == "attn_head"
    for name, header in stored.headers.items():
        prefix, dot, last = name.rpartition(".")
        is_single = all(size == 1 for size in header.shape)
        beside = [f"{prefix}{dot}{cached}" for cached in ("k_scale", "v_scale")]
        is_cached = CACHE.fullmatch(last) or (ATTENTION.fullmatch(last) and any(k in stored.headers for k in beside))
        if name not in taken and (_is_of_activations(name, owners) or (is_cached and (is_single or is_per_head))):
            claims.unused[name] = None


def _is_of_activations(
    name: str,
    owners: set[str],  # names of weights, and of linears with a dot
) -> bool:
    """Whether a tensor is the scale or zero point of what a quantized weight multiplies."""
    prefix, dot, last = name.rpartition(".")
    if ACTIVATIONS.fullmatch(last):
        return prefix + dot in owners
    ends = [match.start() for match in re.finditer("_", last)]
    return any(ACTIVATIONS.fullmatch(last[end + 1 :]) and prefix + dot + last[:end] in owners for end in ends)


def _refuse_remains(stored: Stored, claims: Claims, method: str, is_quantized: bool) -> None:
    """Raises CheckpointError if a tensor looks quantized and no reader has recognized it."""
    taken = claims.names()
    scales = {_kind(part, stored.headers[part]) for item in claims.recognized for part in _scales(item.weight)}
    for name, header in stored.headers.items():
        if name in taken:
            continue
        last = name.rpartition(".")[2]
        is_remain = bool(REMAINS.fullmatch(last)) or header.dtype.startswith(("F8_", "F4", "F6_"))
        is_remain |= header.dtype in EIGHT_BITS and _is_weight_like(last, header)
        is_remain |= bool(PARTS_OF_WEIGHT.fullmatch(name)) or (is_quantized and _is_scale_of_plain(stored, name))
        is_remain |= method in (AWQ, GPTQ) and bool(PACKED_REMAINS.fullmatch(last))
        is_remain |= is_quantized and bool(ACTIVATIONS.fullmatch(last))
        is_remain |= _kind(name, header) in scales
        if is_remain:
            found = stored.fields.get("quant_method")
            known = "" if found is None else f" under quant_method {found!r}"
            raise CheckpointError(
                f"The checkpoint holds {name} ({described(header)}), which looks like a part of a quantized weight, "
                f"but fits no format that this package reads{known}. Expected weights with all their scales, and the "
                f"quantization_config in config.json that they were saved with. {REMEDY}"
            )


def _scales(weight: StoredWeight) -> list[str]:
    """Names of the tensors beside the one that holds the weight itself."""
    return [name for role, name in weight.parts.items() if role not in ("weight", "blocks", "qweight")]


def _kind(name: str, header: StoredHeader) -> tuple[str, str, int]:
    """What the same tensors of different linears have in common: scales of this kind belong to a weight."""
    return name.rpartition(".")[2], header.dtype, len(header.shape)


def _is_weight_like(last: str, header: StoredHeader) -> bool:
    """Whether bytes are a part of a weight and not a buffer."""
    if "weight" in last or last.endswith(("_blocks", "_scales", "_packed")):
        return True
    return len(header.shape) >= 2 and not BUFFER.fullmatch(last)


def _is_scale_of_plain(stored: Stored, name: str) -> bool:
    """Whether a tensor is named as the scales of a matrix that is in the checkpoint."""
    owner = stored.headers.get(name.removesuffix("_scale")) if name.endswith("_scale") else None
    return owner is not None and len(owner.shape) >= 2


def _refuse_collisions(stored: Stored, claims: Claims) -> None:
    """Raises CheckpointError if a weight is there twice."""
    taken = claims.names()
    seen: set[str] = set()
    for item in claims.recognized:
        name = item.weight.name
        if name in seen or (name in stored.headers and name not in taken):
            contradicts(f"{name} is stored in full precision and quantized, or quantized twice", "one of them")
        seen.add(name)


def _without_weights(method: str, claims: Claims) -> SourceFormat | None:
    """What a checkpoint is in which no weight is quantized."""
    if method == NO_CONFIG:
        return None
    if claims.unused:  # without weights, only scales of the KV cache are noted
        return SourceFormat("full precision with scales of the KV cache", 16, False, (), tuple(claims.unused))
    contradicts(
        f"the quantization_config says {method}, but no tensor is quantized so",
        "quantized weights, or a config.json without quantization_config",
    )


def _described(claims: Claims) -> SourceFormat:
    labels = [label for label, _ in Counter(item.label for item in claims.recognized).most_common()]
    return SourceFormat(
        name=shortened(labels, MAX_LABELS),
        bits=min(item.bits for item in claims.recognized),
        is_native=all(item.is_native for item in claims.recognized),
        weights=tuple(item.weight for item in claims.recognized),
        unused=tuple(claims.unused),
    )


def _fp8_block(fields: Mapping[str, Any]) -> list[Block]:
    """weight_block_size; 128 × 128 if the config doesn't say, as in transformers, nothing if it says null."""
    block = fields.get("weight_block_size", (128, 128))
    if block is None:
        return []
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        contradicts(f"weight_block_size in the quantization_config is {block!r}", "two positive numbers or null")
    return [(block[0], block[1])]


def _claim_fp8(stored: Stored, claims: Claims) -> None:
    claim_float8(stored, claims, _fp8_block(stored.fields), int8_is_fp4=True)


def _claim_fbgemm(stored: Stored, claims: Claims) -> None:
    claim_float8(stored, claims, [], transposed_experts=True)


def _claim_modelopt(stored: Stored, claims: Claims) -> None:
    claim_modelopt_nvfp4(stored, claims)
    claim_float8(stored, claims, [])


def _claim_self_described(stored: Stored, claims: Claims) -> None:
    claim_mxfp4(stored, claims)
    claim_bitsandbytes(stored, claims)
    _claim_modelopt(stored, claims)


_CLAIMS: dict[str, Callable[[Stored, Claims], None]] = {
    NO_CONFIG: _claim_self_described,
    "fp8": _claim_fp8,
    "mxfp8": _claim_fp8,
    "fbgemm-fp8": _claim_fbgemm,
    MODELOPT: _claim_modelopt,
    "mxfp4": claim_mxfp4,
    COMPRESSED_TENSORS: claim_compressed_tensors,
    AWQ: claim_awq,
    GPTQ: claim_gptq,
    BITSANDBYTES: claim_bitsandbytes,
}
