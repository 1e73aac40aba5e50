"""Reports what a checkpoint holds and whether it is sound, from its files, tensor by tensor, without the model.

Damage makes a reader fail or compute nonsense: truncated or missing files, shapes that contradict config.json, numbers
that are not finite, a scale of zero in a group whose integers are not all its zero point. Everything else worth a look
is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.awq import PackedWeight, unpack_columns
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.awq_variants import to_gemm
from ..formats.grid import Grid, resolve_group_size
from ..formats.layouts import features_of
from ..formats.pack_quantized import unpack_stream, unpack_zeros
from .layout_checks import LinearFeatures, check_linear
from .opened import (
    CONFIG_NAME,
    Checkpoint,
    index_problems,
    parsed_quantization,
    quantization_fields,
    read_json,
    weight_files,
)
from .safetensors import TensorPlace, tensor_places

FP16_MAX = torch.finfo(torch.float16).max
SATURATED_SHARE = 0.75
"""A group is saturated, its range too narrow, if at least this share of its integers is at the ends of the grid."""
PIECE_ELEMENTS = 1 << 24
"""The number of integers to unpack at once."""
LAYER = re.compile(r"^(.*?\.\d+)\.")
"""Matches a decoder layer's name: the start of a tensor's name up to its first number."""


@dataclass(frozen=True)
class Finding:
    """Damage or a warning."""

    is_damage: bool
    where: str  # a tensor, a linear or a file
    what: str


@dataclass
class LinearFacts:
    """Facts about a packed linear."""

    name: str
    bits: int
    group_size: int  # resolved
    zero_point: bool
    in_features: int
    out_features: int
    groups: int = 0
    zero_scales: int = 0  # damage where the group's integers differ from its zero point
    non_finite_scales: int = 0
    saturated_groups: int = 0
    largest_weight: float = 0.0  # the largest absolute value, of finite scales


@dataclass
class Inspection:
    """Facts about a whole checkpoint."""

    format: str
    files: int
    size_bytes: int
    linears: list[LinearFacts] = field(default_factory=list)
    layer_bytes: dict[str, int] = field(default_factory=dict)  # decoder layer, or "outside" -> bytes of its tensors
    tensors: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_damaged(self) -> bool:
        return any(finding.is_damage for finding in self.findings)


def inspect_checkpoint(folder: Path, headers_only: bool = False) -> Inspection:
    """Inspects the checkpoint in `folder`; with `headers_only` it reads no tensor.

    Raises:
        CheckpointError: there is no config.json or no safetensors file.
    """
    config = read_json(folder / CONFIG_NAME)
    files = weight_files(folder)
    places: dict[str, TensorPlace] = {}
    findings = [Finding(True, CONFIG_NAME, problem) for problem in _config_problems(config)]
    findings += [Finding(True, "index", problem) for problem in index_problems(folder)]
    for file in files:
        try:
            of_file = tensor_places(file)
        except CheckpointError as error:
            findings.append(Finding(True, file.name, str(error)))
            continue
        if twice := sorted(of_file.keys() & places.keys()):
            findings.append(
                Finding(True, file.name, f"{len(twice)} tensors are in another file too, such as {twice[0]}")
            )
        places |= of_file
    is_known = not any(finding.where == CONFIG_NAME for finding in findings)
    checkpoint = Checkpoint(folder, config, places, parsed_quantization(config) if is_known else None)
    result = Inspection(checkpoint.format, len(files), sum(file.stat().st_size for file in files))
    result.findings, result.tensors = findings, len(places)
    result.layer_bytes = _layer_bytes(places)
    packed = {name for linear in checkpoint.linears for name in checkpoint.tensors_of(linear).values()}
    if checkpoint.quantization is not None and not packed:
        result.findings.append(Finding(True, CONFIG_NAME, f"it says {checkpoint.format}, and no linear is packed"))
    for linear in checkpoint.linears:
        facts = _shape_of(checkpoint, linear, result.findings)
        if facts is not None:
            result.linears.append(facts)
            if not headers_only:
                result.findings += _look_at_linear(checkpoint, facts)
    if not headers_only:
        for name in sorted(places.keys() - packed):
            result.findings += _look_at_dense(checkpoint, name)
    return result


def _config_problems(config: dict) -> Iterator[str]:
    fields = quantization_fields(config)
    if fields is not None and "quant_method" not in fields:
        yield "quantization_config has no quant_method"
        return
    try:
        parsed_quantization(config)
    except CheckpointError as error:
        yield str(error)


def _layer_bytes(places: dict[str, TensorPlace]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, place in places.items():
        match = LAYER.match(name)
        layer = match[1] if match else "outside"
        sizes[layer] = sizes.get(layer, 0) + place.end - place.start
    return dict(sorted(sizes.items(), key=lambda entry: [int(p) if p.isdecimal() else 0 for p in entry[0].split(".")]))


# -- packed linears ----------------------------------------------------------------------------------------------------


def _shape_of(checkpoint: Checkpoint, linear: str, findings: list[Finding]) -> LinearFacts | None:
    """A packed linear's facts from its headers; adds a finding and returns None if they contradict config.json."""
    choice = checkpoint.choice(linear)
    if choice is None:
        findings.append(Finding(True, linear, "it is packed, and config.json does not say so"))
        return None
    try:
        in_features, out_features = _features(checkpoint, linear)
        group_size = resolve_group_size(choice.group_size, in_features)
        if in_features % group_size:
            raise CheckpointError(f"{in_features} input channels are not a multiple of the group size {group_size}")
        grid = Grid(choice.bits, group_size, choice.zero_point)
        features = LinearFeatures(in_features, out_features, bias=False)
        check_linear(linear, features, checkpoint.headers, checkpoint.format, grid)
    except CheckpointError as error:
        findings.append(Finding(True, linear, str(error)))
        return None
    return LinearFacts(linear, choice.bits, group_size, choice.zero_point, in_features, out_features)


def _features(checkpoint: Checkpoint, linear: str) -> tuple[int, int]:
    """(in, out) of a packed linear, from `weight_shape` or from the shape of `qweight`."""
    config = checkpoint.quantization
    if not isinstance(config, AwqCheckpointConfig):
        name = f"{linear}.weight_shape"
        if name not in checkpoint.places:
            raise CheckpointError(f"{name} is missing")
        if checkpoint.places[name].shape != (2,) or checkpoint.places[name].dtype not in ("I64", "I32"):
            raise CheckpointError(f"{name} is {checkpoint.headers[name]}; expected two integers, out and in")
        out_features, in_features = checkpoint.read(name).tolist()
        if min(out_features, in_features) < 1:
            raise CheckpointError(f"{name} says {out_features} × {in_features}; expected positive numbers")
        return in_features, out_features
    shape = checkpoint.places[f"{linear}.qweight"].shape
    if len(shape) != 2:
        raise CheckpointError(f"{linear}.qweight has the shape {shape}; expected two dimensions")
    if 0 in shape:
        raise CheckpointError(f"{linear}.qweight has the shape {shape}; expected positive sizes")
    return features_of(config.version, (shape[0], shape[1]))


def _look_at_linear(checkpoint: Checkpoint, facts: LinearFacts) -> Iterator[Finding]:
    """Fills `facts` in from the tensors and yields the findings."""
    worthless = 0  # groups with a scale of zero whose integers differ from the zero point
    levels = 2**facts.bits - 1
    for codes, zeros, scales in _pieces(checkpoint, facts):
        finite = scales.isfinite()
        is_zero = scales == 0
        offset = codes.to(torch.int16) - zeros.unsqueeze(-1).to(torch.int16)
        says_something = (offset != 0).any(-1)
        at_the_ends = ((codes == 0) | (codes == levels)).float().mean(-1) >= SATURATED_SHARE
        largest = offset.abs().amax(-1) * torch.where(finite, scales, 0.0).abs()
        facts.groups += scales.numel()
        facts.non_finite_scales += int((~finite).sum())
        facts.zero_scales += int(is_zero.sum())
        facts.saturated_groups += int((at_the_ends & says_something).sum())
        facts.largest_weight = max(facts.largest_weight, float(largest.max()))
        worthless += int((is_zero & says_something).sum())
    if facts.non_finite_scales:
        yield Finding(True, facts.name, f"{facts.non_finite_scales} of {facts.groups} scales are not finite")
    if worthless:
        yield Finding(
            True, facts.name, f"{worthless} of {facts.groups} groups have a scale of zero: their weights are lost"
        )
    if facts.saturated_groups:
        yield Finding(
            False,
            facts.name,
            f"{facts.saturated_groups} of {facts.groups} groups have {SATURATED_SHARE:.0%} or more of their integers "
            "at the ends of the grid",
        )
    if facts.largest_weight > FP16_MAX:
        yield Finding(False, facts.name, f"weights up to {facts.largest_weight:.3g} overflow in fp16")


def _pieces(checkpoint: Checkpoint, facts: LinearFacts) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields a few groups at a time: codes (a, b, group_size) uint8, zero points (a, b) and scales (a, b) fp32."""
    names = checkpoint.tensors_of(facts.name)
    stored = {name: checkpoint.read(tensor) for name, tensor in names.items()}
    n = facts.in_features // facts.group_size
    if isinstance(checkpoint.quantization, AwqCheckpointConfig):
        packed = to_gemm(checkpoint.quantization.version, PackedWeight(**stored), n)
        zeros, scales = unpack_columns(packed.qzeros), packed.scales.float()
        step = max(1, PIECE_ELEMENTS // (facts.group_size * facts.out_features))
        for first in range(0, n, step):
            groups = slice(first, first + step)
            rows = slice(first * facts.group_size, (first + step) * facts.group_size)
            codes = unpack_columns(packed.qweight[rows]).unflatten(0, (-1, facts.group_size)).movedim(1, -1)
            yield codes, zeros[groups], scales[groups]
        return
    scales = stored["weight_scale"].float()
    all_zeros = unpack_zeros(stored.get("weight_zero_point"), facts.out_features, facts.bits)
    if all_zeros is None:
        all_zeros = torch.full(scales.shape, 2 ** (facts.bits - 1), dtype=torch.uint8)
    step = max(1, PIECE_ELEMENTS // facts.in_features)
    for first in range(0, facts.out_features, step):
        rows = slice(first, first + step)
        codes = unpack_stream(stored["weight_packed"][rows], facts.in_features, facts.bits).unflatten(1, (n, -1))
        yield codes, all_zeros[rows], scales[rows]


# -- all other tensors -------------------------------------------------------------------------------------------------


def _look_at_dense(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    try:
        tensor = checkpoint.read(name)
    except CheckpointError as error:
        yield Finding(True, name, str(error))
        return
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return
    low, high = (value.item() for value in torch.aminmax(tensor))  # any NaN comes through
    if not (low > -torch.inf and high < torch.inf):
        count = int((~tensor.isfinite()).sum())
        yield Finding(True, name, f"{count} of {tensor.numel()} numbers are not finite")
    elif max(-low, high) > FP16_MAX:
        yield Finding(False, name, f"numbers up to {max(-low, high):.3g} overflow in fp16")
