"""AWQ: 4-bit integers in the layouts gemm, gemv, gemv_fast and llm-awq (../layouts.py); w = (q - z) · Δ in fp32.

A product of a difference of 4-bit integers and an fp16 is exact in fp32. AutoAWQ computes it in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..awq import BITS, PackedWeight, unpack_weight
from ..awq_variants import FAST_COLUMNS, to_gemm
from ..grid import Grid
from ..layouts import AWQ_FORMATS, GEMM, GEMV, features_of, find_tensors, tensors_of
from .integers import VALUES_AT_A_TIME
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
    value_of,
)


def claim_awq(stored: Stored, claims: Claims) -> None:
    """Recognizes every linear of an AWQ checkpoint.

    Raises:
        CheckpointError: a format that this package can't read, or tensors that contradict each other or the config.
    """
    fields = stored.fields
    said = value_of(fields, "version", str, None) or value_of(fields, "format", str, GEMM)
    version = "llm-awq" if fields.get("backend") == "llm-awq" else said.lower()
    if version not in AWQ_FORMATS:
        unsupported(f"its AWQ version is {version!r}, not one of {', '.join(AWQ_FORMATS)}")
    bits = value_of(fields, "bits", int, value_of(fields, "w_bit", int, BITS))
    if bits != BITS:
        unsupported(f"it has AWQ weights of {bits} bits, not {BITS}")
    for name in stored.headers:
        prefix, _, last = name.rpartition(".")
        if last == "qweight":
            claims.recognized.append(_linear(stored, f"{prefix}." if prefix else "", version))


def _linear(stored: Stored, dot: str, version: str) -> Recognized:
    owner = f"{dot}qweight"
    packed = stored.require(owner, owner, ["I32" if version in (GEMM, GEMV) else "I16"], 2)
    names = find_tensors(version, stored.headers, dot)
    headers = {"qweight": packed}
    for role in ("qzeros", "scales"):
        dtypes = ["I32"] if role == "qzeros" and version in (GEMM, GEMV) else FLOATS
        headers[role] = stored.require(names.get(role, f"{dot}{role}"), owner, dtypes, 2)
    in_features, out_features = features_of(version, (packed.shape[0], packed.shape[1]))
    n = _groups(stored, owner, version, in_features, headers["scales"])
    grid = Grid(BITS, in_features // n, zero_point=True)
    padded = {GEMM: n, GEMV: headers["scales"].shape[1]}.get(version, headers["scales"].shape[0])
    if padded < n or (version not in (GEMM, GEMV) and in_features % FAST_COLUMNS):
        contradicts(
            f"{owner} is {described(packed)}, its scales {described(headers['scales'])}", f"{n} groups in a row"
        )
    for role, layout in tensors_of(version, in_features, out_features, grid, padded_groups=padded).items():
        if tuple(headers[role].shape) != layout.shape:
            contradicts(f"{names[role]} is {described(headers[role])}", f"{layout.shape}, beside {described(packed)}")
    weight = StoredWeight(
        f"{dot}weight",
        names,
        (out_features, in_features),
        torch.float32,
        partial(_dequantize, version=version, n=n),
    )
    return Recognized(weight, f"AWQ, {BITS} bits", BITS)


def _groups(stored: Stored, name: str, version: str, in_features: int, scales: StoredHeader) -> int:
    """Groups in a row. gemm has no padding, so its scales say it; for the others it's the config."""
    said = value_of(stored.fields, "group_size", int, value_of(stored.fields, "q_group_size", int, None))
    if said is None:
        said = in_features // scales.shape[0] if version == GEMM else 128
    size = in_features if said == -1 else said
    if size < 1 or in_features % size or (version == GEMM and in_features // size != scales.shape[0]):
        contradicts(
            f"{name} has {in_features} input channels and {described(scales)} as scales, and the config says "
            f"group_size {said}",
            "whole groups",
        )
    return in_features // size


def _dequantize(parts: Mapping[str, Tensor], version: str, n: int) -> Tensor:
    packed = to_gemm(version, PackedWeight(parts["qweight"], parts["qzeros"], parts["scales"]), n)
    in_features, words = packed.qweight.shape
    per_word = packed.scales.shape[1] // words
    weight = torch.empty(words * per_word, in_features, dtype=torch.float32)
    step = max(1, VALUES_AT_A_TIME // (in_features * per_word))
    for first in range(0, words, step):
        few, rows = slice(first, first + step), slice(first * per_word, (first + step) * per_word)
        part = PackedWeight(packed.qweight[:, few], packed.qzeros[:, few], packed.scales[:, rows])
        weight[rows] = unpack_weight(part, torch.float32)
    return weight
