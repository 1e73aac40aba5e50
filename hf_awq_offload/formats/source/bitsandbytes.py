"""bitsandbytes, as transformers saves it: nf4 and fp4 in bytes, and int8.

    4 bits   P.weight                          ⌈numel / 2⌉ bytes, the first value in the upper half, in any dtype
             P.weight.absmax                   fp32 for each block of values, or uint8 if it is quantized, too
             P.weight.quant_map                (16,) fp32
             P.weight.nested_absmax, .nested_quant_map    fp32, (256,) fp32: for absmax, in blocks of 256
             P.weight.quant_state.bitsandbytes__nf4       JSON in bytes: shape, dtype, blocksize, nested_offset …
    8 bits   P.weight (out, in) int8, P.SCB (out,) fp32, P.weight_format = 0: rows

4 bits: map[q] · absmax in fp32, rounded to the dtype that the weight had; a nested absmax is nested_map[q] ·
nested_absmax + nested_offset. 8 bits: (q · SCB) · (1 / 127) in fp32, as transformers' `dequantize_bnb_weight` has it.

Sources: bitsandbytes 0.50 `functional.QuantState`, `dequantize_4bit`, `_ops.int8_vectorwise_dequant`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...json_text import parse_json
from .records import (
    FLOATS,
    Claims,
    Recognized,
    Stored,
    StoredHeader,
    StoredWeight,
    contradicts,
    described,
    unsupported,
)
from .scaling import unpack_pairs

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
"""dtypes in which the bytes of 4-bit weights may be stored (`bnb_4bit_quant_storage`), and their size."""
STATE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_STATE_BYTES = 1 << 16
MAX_SIZE = 2**31
ROWS = 0  # weight_format
INVERSE_OF_127 = 7.874015718698502e-3


def claim_bitsandbytes(stored: Stored, claims: Claims) -> None:
    """Recognizes every weight of bitsandbytes.

    Raises:
        CheckpointError: tensors are missing or contradict each other.
    """
    for name in stored.headers:
        state = STATE.fullmatch(name)
        prefix, _, last = name.rpartition(".")
        if state is not None:
            claims.recognized.append(_four_bits(stored, state[1], name))
            claims.unused[name] = None
        elif last == "SCB":
            claims.recognized.append(_eight_bits(stored, name))
            layout = f"{prefix}.weight_format" if prefix else "weight_format"
            if layout in stored.headers:
                if math.prod(stored.require(layout, name, ["U8"]).shape) != 1:
                    contradicts(f"{layout} is {described(stored.headers[layout])}", "one value")
                found = stored.read(layout)
                if int(found) != ROWS:
                    unsupported(f"{layout} is {found.tolist()}, not {ROWS} (rows)")
                claims.unused[layout] = None


def _eight_bits(stored: Stored, scale: str) -> Recognized:
    name = f"{scale.removesuffix('SCB')}weight"
    weight = stored.require(name, scale, ["I8"], 2)
    scales = stored.require(scale, name, ["F32", "F16", "BF16"])
    if math.prod(scales.shape) != weight.shape[0]:
        contradicts(f"{scale} is {described(scales)}, and {name} is {described(weight)}", "a value for each row")
    parts = {"weight": name, "scale": scale}
    record = StoredWeight(name, parts, tuple(weight.shape), torch.float32, _dequantize_int8)
    return Recognized(record, "bitsandbytes, 8 bits", 8)


def _dequantize_int8(parts: Mapping[str, Tensor]) -> Tensor:
    weight = parts["weight"].to(torch.float32)
    return weight.mul_(parts["scale"].to(torch.float32).view(-1, 1)).mul_(INVERSE_OF_127).contiguous()


def _four_bits(stored: Stored, name: str, state: str) -> Recognized:
    packed = stored.require(name, state, list(BYTES))
    fields = _state(stored, state)
    shape, blocksize = fields["shape"], fields["blocksize"]
    numel = math.prod(shape)
    if math.prod(packed.shape) * BYTES[packed.dtype] != -(-numel // 2):
        contradicts(f"{name} is {described(packed)}, and {state} says {shape}", f"{-(-numel // 2)} bytes")
    parts = {"weight": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map"}
    blocks = -(-numel // blocksize)
    nested = f"{name}.nested_absmax" in stored.headers or "nested_blocksize" in fields
    _require_size(stored, parts["absmax"], name, ["U8"] if nested else FLOATS, blocks)
    _require_size(stored, parts["map"], name, FLOATS, 16)
    if nested:
        if not {"nested_blocksize", "nested_offset"} <= fields.keys():
            contradicts(f"{name} has a quantized absmax, and {state} lacks nested_blocksize or nested_offset", "both")
        parts |= {"nested_absmax": f"{name}.nested_absmax", "nested_map": f"{name}.nested_quant_map"}
        _require_size(stored, parts["nested_absmax"], name, FLOATS, -(-blocks // fields["nested_blocksize"]))
        _require_size(stored, parts["nested_map"], name, FLOATS, 256)
    dtype = fields["dtype"]
    record = StoredWeight(name, parts, shape, dtype, partial(_dequantize_4bit, fields=fields))
    return Recognized(record, f"bitsandbytes, {fields['quant_type']}", 4)


def _require_size(stored: Stored, name: str, owner: str, dtypes: list[str] | tuple[str, ...], size: int) -> None:
    header: StoredHeader = stored.require(name, owner, dtypes)
    if math.prod(header.shape) != size:
        contradicts(f"{name} is {described(header)}", f"{size} values for {owner}")


def _state(stored: Stored, name: str) -> dict[str, Any]:
    """The quant state, checked."""
    header = stored.require(name, name, ["U8"])
    if math.prod(header.shape) > MAX_STATE_BYTES:
        contradicts(f"{name} is {described(header)}", f"at most {MAX_STATE_BYTES} bytes of JSON")
    try:
        raw = parse_json(bytes(stored.read(name).flatten().tolist()))
        fields = {
            "shape": tuple(raw["shape"]),
            "blocksize": raw["blocksize"],
            "dtype": STATE_DTYPES[raw["dtype"]],
            "quant_type": raw["quant_type"],
        }
        if raw.get("nested_blocksize") is not None:
            fields |= {"nested_blocksize": raw["nested_blocksize"], "nested_offset": float(raw["nested_offset"])}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        contradicts(
            f"{name} can't be read ({type(error).__name__}: {error})", "the quant state that bitsandbytes saves"
        )
    sizes = [*fields["shape"], fields["blocksize"], fields.get("nested_blocksize", 1)]
    if not fields["shape"] or not all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes):
        contradicts(f"{name} says {raw}", "positive sizes")
    return fields


def _dequantize_4bit(parts: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Tensor:
    shape, blocksize = fields["shape"], fields["blocksize"]
    absmax = parts["absmax"].flatten()
    if "nested_absmax" in parts:
        scale = parts["nested_absmax"].flatten().to(torch.float32)
        absmax = _in_blocks(
            parts["nested_map"].to(torch.float32)[absmax.to(torch.int64)], scale, fields["nested_blocksize"]
        )
        absmax = absmax + torch.tensor(fields["nested_offset"])
    stored = parts["weight"].contiguous().flatten().view(torch.uint8)
    values = unpack_pairs(stored, parts["map"].flatten().to(torch.float32), first_is_low=False)[: math.prod(shape)]
    return _in_blocks(values, absmax.to(torch.float32), blocksize).to(fields["dtype"]).reshape(shape)


def _in_blocks(
    values: Tensor,  # (numel,) fp32, changed in place
    scale: Tensor,  # (⌈numel / blocksize⌉,) fp32
    blocksize: int,
) -> Tensor:
    """values · scale of the block; the last block may be shorter."""
    full = values.numel() // blocksize * blocksize
    values[:full].view(-1, blocksize).mul_(scale[: full // blocksize, None])
    if full < values.numel():
        values[full:].mul_(scale[-1])
    return values
