"""GPTQ: integers of 2, 3, 4 or 8 bits in streams along the input channels.

    qweight   (⌈in · b / 32⌉, out)   int32    a stream of bits in each column, as pack_quantized.py has it in a row
    qzeros    (n, ⌈out · b / 32⌉)    int32    a stream of bits in each row
    scales    (n, out)               fp16, bf16 or fp32
    g_idx     (in,)                  int32    the group of each input channel; without desc_act it may be absent

w[j, i] = (q - z) · Δ of group g_idx[i], here in fp32. gptqmodel computes the same in the dtype of the scales.

checkpoint_format "gptq" stores z - 1, "gptq_v2" stores z. gptqmodel, with which transformers loads, adds 1 to every
field of a word at once, so that a field of all ones carries into the next; the same addition here keeps the bits equal.
At 3 bits, where fields cross words, it adds to each field.

Sources: gptqmodel 7.7 `BaseQuantLinear.dequantize_weight` and `convert_gptq_v1_to_v2_format_module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..pack_quantized import WORD_BITS, unpack_stream, words_for
from .integers import dequantize_rows_in_chunks, groups_of
from .records import FLOATS, Claims, Recognized, Stored, StoredWeight, contradicts, described, unsupported, value_of

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


def claim_gptq(stored: Stored, claims: Claims) -> None:
    """Recognizes every linear of a GPTQ checkpoint.

    Raises:
        CheckpointError: a format that this package can't read, or tensors that contradict each other or the config.
    """
    fields = stored.fields
    version = value_of(fields, "checkpoint_format", str, None) or value_of(fields, "format", str, V1)
    if version.lower() not in (V1, V2) or fields.get("is_marlin_format"):
        unsupported(
            f"its GPTQ checkpoint_format is {version!r}" + (" (Marlin)" if fields.get("is_marlin_format") else "")
        )
    for name in stored.headers:
        prefix, _, last = name.rpartition(".")
        if last == "qweight":
            claims.recognized.append(_linear(stored, f"{prefix}." if prefix else "", version.lower() == V1))


def _linear(stored: Stored, dot: str, is_v1: bool) -> Recognized:
    names = {part: f"{dot}{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    owner = names["qweight"]
    packed = stored.require(owner, owner, ["I32"], 2)
    zeros = stored.require(names["qzeros"], owner, ["I32"], 2)
    scales = stored.require(names["scales"], owner, FLOATS, 2)
    n, out_features = scales.shape
    if packed.shape[1] != out_features or zeros.shape[0] != n:
        contradicts(
            f"{owner} is {described(packed)}, {names['qzeros']} {described(zeros)} and {names['scales']} "
            f"{described(scales)}",
            "(in · bits / 32, out), (n, out · bits / 32) and (n, out)",
        )
    order = None
    if names["g_idx"] in stored.headers:
        order = stored.require(names["g_idx"], owner, ["I32", "I64"], 1).shape[0]
    elif stored.fields.get("desc_act"):
        stored.require(names["g_idx"], owner, ["I32"])
    bits = _bits_of(stored, owner, out_features, zeros.shape[1], packed.shape[0], order)
    in_features = order or packed.shape[0] * WORD_BITS // bits
    parts = dict(names)
    group_size = None
    if order is None:
        del parts["g_idx"]
        group_size = _group_size(stored, owner, in_features, n)
    shape = (out_features, in_features)
    dequantize = partial(_dequantize, shape=shape, bits=bits, is_v1=is_v1, group_size=group_size, name=names["g_idx"])
    weight = StoredWeight(f"{dot}weight", parts, shape, torch.float32, dequantize)
    return Recognized(weight, f"GPTQ, {bits} bits", bits)


def _bits_of(
    stored: Stored,
    name: str,
    out_features: int,
    zero_words: int,  # in a row of qzeros
    weight_words: int,  # in a column of qweight
    in_features: int | None,  # None without g_idx
) -> int:
    """The number of bits that explains the sizes; the config decides between several. gptqmodel may mix them."""
    fitting = [bits for bits in BITS if words_for(out_features, bits) == zero_words]
    if in_features is None:
        fitting = [bits for bits in fitting if weight_words * WORD_BITS % bits == 0]
    else:
        fitting = [bits for bits in fitting if words_for(in_features, bits) == weight_words]
    said = value_of(stored.fields, "bits", int, None)
    if said in fitting:
        return int(said)
    if len(fitting) != 1 or (said is not None and not stored.fields.get("dynamic")):
        contradicts(
            f"the words of {name} and of its qzeros fit {fitting or 'no number of'} bits, and the config says {said}",
            f"the number of bits in the config, one of {BITS}",
        )
    return fitting[0]


def _group_size(stored: Stored, name: str, in_features: int, n: int) -> int:
    said = value_of(stored.fields, "group_size", int, None)
    size = in_features if said == -1 else said
    if size is None or size < 1 or -(-in_features // size) != n:
        if in_features % n:
            contradicts(f"{name} has {in_features} rows in {n} groups, and the config says group_size {said}", "g_idx")
        size = in_features // n
    return size


def _dequantize(
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    bits: int,
    is_v1: bool,
    group_size: int | None,
    name: str,
) -> Tensor:
    out_features, in_features = shape
    packed, scales = parts["qweight"], parts["scales"]
    n = scales.shape[0]
    g_idx = torch.arange(in_features) // group_size if group_size is not None else parts["g_idx"]
    return dequantize_rows_in_chunks(
        lambda first, last: unpack_stream(packed[:, first:last].t(), in_features, bits),
        (out_features, in_features),
        scales.t(),
        _zeros(parts["qzeros"], out_features, bits, is_v1).t(),
        groups_of(g_idx, n, name),
        torch.float32,
    )


def _zeros(words: Tensor, out_features: int, bits: int, is_v1: bool) -> Tensor:
    """Zero points, (n, out) uint8."""
    if not is_v1:
        return unpack_stream(words, out_features, bits)
    if bits == 3:
        return unpack_stream(words, out_features, bits) + 1 & 2**bits - 1
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
    return unpack_stream(words + ones, out_features, bits)
