"""Which scales can be folded away, found by measuring a decoder layer instead of naming architectures.

AWQ multiplies the input channels of a linear by s and divides whatever produces that input by s. What can absorb
1/s is measured:

1. Linears that receive equal inputs form one *input group*: they share s.
2. Every *producer* candidate (a norm's weight w, a norm that multiplies by 1 + w, a linear's rows) gets its output
   channels multiplied by known factors; where an input channel c changes by exactly the factor of row r, for every
   token, c is fed by r, linearly. That finds q/k/v ← norm, o ← v with grouped queries (several c for one r), down ← up.
3. A fold is used only after a proof on the layer at hand: random scales, compensated in the consumers, must leave
   the layer's output unchanged.

Probes run in fp32 on copies (`torch.func.functional_call`): the layer's own weights are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from .layers import LayerCall, LayerRunner, linears_in

LEVELS = 32
"""Distinct factors of one probe: 1.25 … 5, about 4.6 % apart; a row's index is read as digits in this base."""
RATIO_TOLERANCE = 1e-3
"""Largest relative deviation of a channel from an exact multiple; fp32 rounding stays well below it."""
PROOF_SENSITIVITY = 1e-4
"""A proof counts only if scaling the producer *without* compensation changes the output by at least this much …"""
PROOF_TOLERANCE = 1e-3
"""… and compensation undoes the change to this fraction of it, or to fp32 rounding."""
ROUNDING_CHANGE = 3e-6
"""Relative change of a layer's output that fp32 rounding alone may cause."""


class ProducerKind(Enum):
    """How a producer's output channels are multiplied by a factor."""

    ROWS = "rows"  # a linear: weight rows and bias
    NORM = "norm"  # a norm: weight, and bias if there is one
    NORM_PLUS_ONE = "norm_plus_one"  # a norm that multiplies by 1 + weight (Gemma)


@dataclass(frozen=True)
class Fold:
    """A producer that can absorb 1/s of an input group."""

    producer: str  # module name within the layer
    kind: ProducerKind
    row_of_channel: Tensor  # (in,) int64: the producer's output row that feeds each input channel
    rows: int  # output rows of the producer

    def channel_scale(
        self,
        row_scale: Tensor,  # (rows,)
    ) -> Tensor:
        """The scale of every input channel, (in,)."""
        return row_scale[self.row_of_channel.to(row_scale.device)]


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same input, and what can absorb its scale (None: nothing, proven or found)."""

    consumers: tuple[str, ...]
    fold: Fold | None


@dataclass(frozen=True)
class LayerStructure:
    """What probing found in one decoder layer; layers of equal `structure_key` share it."""

    groups: tuple[InputGroup, ...]
    softmax_only: frozenset[str]
    """Linears without influence on a lone token's output: those that only steer a softmax over tokens (q, k)."""


@dataclass(frozen=True)
class ProbeCalls:
    """Short inputs for one layer, fp32-castable: several tokens, and a single one."""

    several: tuple[LayerCall, Tensor]
    single: tuple[LayerCall, Tensor]


def structure_key(layer: nn.Module) -> tuple[object, ...]:
    """Equal for layers of the same classes, shapes and plain settings, whatever their weights and their index."""
    key: list[object] = []
    for name, module in layer.named_modules():
        settings = tuple(
            (attribute, value)
            for attribute, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and attribute not in ("layer_idx", "training")
        )
        shapes = tuple((key_, tuple(tensor.shape)) for key_, tensor in module.named_parameters(recurse=False))
        key.append((name, type(module), settings, shapes))
    return tuple(key)


def discover_structure(layer: nn.Module, probes: ProbeCalls, device: torch.device, seed: int) -> LayerStructure:
    """Probe `layer` (on `device`); costs one short forward per linear and norm, and a few for each fold found."""
    probe = _Probe(layer, probes, device, seed)
    inputs = probe.inputs({})
    groups = []
    for consumers, fold in zip(
        grouped := _group_equal_inputs(inputs), _find_folds(probe, inputs, grouped), strict=True
    ):
        proven = fold is not None and probe.proves([InputGroup(consumers, fold)])
        groups.append(InputGroup(consumers, fold if proven else None))
    return LayerStructure(tuple(groups), probe.without_influence_on_a_lone_token())


def provable_structure(
    layer: nn.Module, structure: LayerStructure, probes: ProbeCalls, device: torch.device, seed: int
) -> LayerStructure:
    """`structure`, found on another layer, less the folds that this layer's weights contradict."""
    probe = _Probe(layer, probes, device, seed)
    if probe.proves([group for group in structure.groups if group.fold is not None]):
        return structure
    kept = [
        group if group.fold is None or probe.proves([group]) else InputGroup(group.consumers, None)
        for group in structure.groups
    ]
    return LayerStructure(tuple(kept), structure.softmax_only)


def scaled_producer(
    tensors: Mapping[str, Tensor],  # the layer's parameters by name
    fold: Fold,
    factor: Tensor,  # (rows,)
) -> dict[str, Tensor]:
    """The producer's parameters with its output row r multiplied by factor[r]; computed in factor's dtype."""
    weight = tensors[f"{fold.producer}.weight"].to(factor.dtype)
    if fold.kind is ProducerKind.NORM_PLUS_ONE:
        scaled = (1 + weight) * factor - 1
    else:
        scaled = weight * (factor if weight.ndim == 1 else factor.unsqueeze(1))
    result = {f"{fold.producer}.weight": scaled}
    bias = tensors.get(f"{fold.producer}.bias")
    if bias is not None:
        result[f"{fold.producer}.bias"] = bias.to(factor.dtype) * factor
    return result


class _Probe:
    """Runs one layer in fp32 with overridden parameters and looks at linear inputs and outputs."""

    def __init__(self, layer: nn.Module, probes: ProbeCalls, device: torch.device, seed: int):
        self.layer = layer
        self.linears = linears_in(layer)
        self.runner = LayerRunner(layer, device, torch.float32)
        names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
        self.parameters = {name: self.runner.tensors[name] for name in names}
        self.probes = probes
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.reference = self.runner.observe(*probes.several)

    def inputs(self, overrides: dict[str, Tensor]) -> dict[str, Tensor]:
        """Input of every linear that ran, (tokens, in) fp32, in the order of their calls."""
        seen: dict[str, Tensor] = {}

        def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: seen.update({name: args[0].detach().reshape(-1, args[0].shape[-1])})

        handles = [module.register_forward_pre_hook(remember(name)) for name, module in self.linears.items()]
        try:
            self.runner.observe(*self.probes.several, overrides)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def candidates(self) -> list[Fold]:
        """Everything that might absorb a scale, norms first, with the identity for its row map."""
        found = []
        for name, module in self.layer.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if weight.ndim == 1:
                kinds = [ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE]
            elif isinstance(module, nn.Linear):
                kinds = [ProducerKind.ROWS]
            else:
                continue
            rows = weight.shape[0]
            found += [Fold(name, kind, torch.arange(rows), rows) for kind in kinds]
        return sorted(found, key=lambda fold: fold.kind is ProducerKind.ROWS)

    def proves(self, groups: list[InputGroup]) -> bool:
        """Whether random scales on all of `groups`, compensated, leave the layer's output as it is.

        What the residual stream carries past the linears would drown a fault, so the change is held against the one
        that the same scales cause without compensation.
        """
        if not groups:
            return True
        scaled = dict(self.parameters)
        compensation: dict[str, Tensor] = {}
        for group in groups:
            assert group.fold is not None
            log_scale = torch.rand(group.fold.rows, generator=self.generator) * 2 - 1
            row_scale = torch.exp(log_scale).to(self.device)
            scaled.update(scaled_producer(scaled, group.fold, 1 / row_scale))
            channel_scale = group.fold.channel_scale(row_scale)
            compensation.update({f"{consumer}.weight": channel_scale for consumer in group.consumers})
        uncompensated = self._change(self.runner.observe(*self.probes.several, scaled), self.reference)
        scaled.update({name: scaled[name] * channel_scale for name, channel_scale in compensation.items()})
        compensated = self._change(self.runner.observe(*self.probes.several, scaled), self.reference)
        allowed = max(PROOF_TOLERANCE * uncompensated, ROUNDING_CHANGE)
        return uncompensated >= PROOF_SENSITIVITY and compensated <= allowed

    def without_influence_on_a_lone_token(self) -> frozenset[str]:
        """Linears whose weights a single token's output does not depend on: a softmax over one token is constant."""
        reference = self.runner.observe(*self.probes.single)
        names = []
        for name in self.linears:
            weight = self.parameters[f"{name}.weight"]
            factor = 1.5 + torch.rand(weight.shape[0], generator=self.generator).to(self.device)
            output = self.runner.observe(*self.probes.single, {f"{name}.weight": weight * factor.unsqueeze(1)})
            if all(map(torch.equal, output, reference)):  # exactly: the softmax of a single logit is 1.0
                names.append(name)
        return frozenset(names)

    @staticmethod
    def _change(outputs: list[Tensor], references: list[Tensor]) -> float:
        """The largest ‖output - reference‖ / ‖reference‖ of all outputs, infinite where that is not a number."""
        largest = 0.0
        for output, reference in zip(outputs, references, strict=True):
            if output.shape != reference.shape:
                return float("inf")
            change = (output - reference).norm() / reference.norm().clamp(min=torch.finfo(reference.dtype).tiny)
            largest = max(largest, float(change) if bool(torch.isfinite(change)) else float("inf"))
        return largest


def storable_scale(
    layer: nn.Module,
    fold: Fold,
    row_scale: Tensor,  # (rows,) fp32
) -> Tensor | None:
    """The scale that dividing the producer by `row_scale` amounts to, (rows,) fp32; None if it can't be stored.

    A norm's weight w is rounded to its dtype once it is divided by s. Multiplying the consumers by w / round(w / s)
    makes the fold exact in spite of that (all but a bias, whose own rounding stays). It can't be stored where a
    channel would overflow, vanish or change its sign.
    """
    divided = _divided_producer(layer, fold, row_scale)
    if not all(bool(torch.isfinite(value).all()) for value in divided.values()):
        return None
    if fold.kind is ProducerKind.ROWS:
        return row_scale
    name = f"{fold.producer}.weight"
    offset = 1 if fold.kind is ProducerKind.NORM_PLUS_ONE else 0
    before = layer.get_parameter(name).detach().float() + offset
    after = divided[name].float() + offset
    if bool(((before != 0) & (before * after <= 0)).any()):
        return None
    return torch.where(before == 0, row_scale, before / after)


def absorb(
    layer: nn.Module,
    fold: Fold,
    row_scale: Tensor,  # (rows,) fp32, as `storable_scale` returned it
) -> None:
    """Divide the producer's output channels by `row_scale`, in place."""
    for name, value in _divided_producer(layer, fold, row_scale).items():
        layer.get_parameter(name).data.copy_(value)


def _divided_producer(layer: nn.Module, fold: Fold, row_scale: Tensor) -> dict[str, Tensor]:
    """The producer's parameters, divided by `row_scale` and rounded to their dtypes."""
    module = layer.get_submodule(fold.producer)
    tensors = {f"{fold.producer}.{name}": value.detach() for name, value in module.named_parameters(recurse=False)}
    return {
        name: value.to(tensors[name].dtype) for name, value in scaled_producer(tensors, fold, 1 / row_scale).items()
    }


def _group_equal_inputs(inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Names of linears whose inputs are equal in value, one tuple per distinct input."""
    groups: list[list[str]] = []
    for name, x in inputs.items():
        for group in groups:
            other = inputs[group[0]]
            if other.shape == x.shape and torch.equal(other, x):
                group.append(name)
                break
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


def _find_folds(probe: _Probe, inputs: Mapping[str, Tensor], groups: list[tuple[str, ...]]) -> list[Fold | None]:
    """For every group of consumers the first producer whose rows feed all its channels, or None."""
    found: list[Fold | None] = [None] * len(groups)
    for candidate in probe.candidates():
        open_groups = [
            index
            for index, consumers in enumerate(groups)
            if found[index] is None and candidate.producer not in consumers
        ]
        if not open_groups:
            break
        for index, row_of_channel in _rows_feeding(probe, candidate, inputs, groups, open_groups).items():
            found[index] = Fold(candidate.producer, candidate.kind, row_of_channel, candidate.rows)
    return found


def _rows_feeding(
    probe: _Probe,
    candidate: Fold,
    inputs: Mapping[str, Tensor],
    groups: list[tuple[str, ...]],
    open_groups: list[int],
) -> dict[int, Tensor]:
    """Group index -> (in,) row of `candidate` that feeds each channel, for the groups that it feeds wholly.

    Row indices are read digit by digit: one probe tells which of `LEVELS` factors a channel was multiplied by.
    """
    factors = torch.logspace(0, 1, LEVELS, base=4.0, device=probe.device) * 1.25
    rows = torch.arange(candidate.rows, device=probe.device)
    decoded: dict[int, Tensor] = {}
    place = 1
    remaining = open_groups
    while remaining and (place == 1 or place < candidate.rows):
        factor = factors[(rows // place) % LEVELS]
        changed = probe.inputs(scaled_producer(probe.parameters, candidate, factor))
        still_fed = []
        for index in remaining:
            name = groups[index][0]
            digits = _factor_index(inputs[name], changed[name], factors) if name in changed else None
            if digits is not None:
                decoded[index] = decoded.get(index, 0) + torch.where(
                    digits < 0, -candidate.rows * place, digits * place
                )
                still_fed.append(index)
        remaining = still_fed
        place *= LEVELS
    return {
        index: row_of_channel.cpu()
        for index in remaining
        if (row_of_channel := _complete_row_map(decoded[index], candidate.rows)) is not None
    }


def _factor_index(
    before: Tensor,  # (tokens, in)
    after: Tensor,  # (tokens, in)
    factors: Tensor,  # (LEVELS,)
) -> Tensor | None:
    """Which factor every channel was multiplied by, (in,) int64; -1 for channels that are zero throughout.

    None when some channel changed in any other way: not at all, by another factor, or differently from token to token.
    """
    if before.shape != after.shape:
        return None
    energy = before.square().sum(dim=0)
    alive = energy > 0
    if not bool(alive.any()):
        return None
    ratio = (before * after).sum(dim=0) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    residual = (after - ratio * before).norm(dim=0)
    index = (ratio.unsqueeze(1).log() - factors.log()).abs().nan_to_num(nan=torch.inf).argmin(dim=1)
    deviation = (ratio / factors[index] - 1).abs()
    linear = (residual <= RATIO_TOLERANCE * after.norm(dim=0)) & (deviation <= RATIO_TOLERANCE)
    if not bool((linear | ~alive).all()):
        return None
    return torch.where(alive, index, -1)


def _complete_row_map(
    row_of_channel: Tensor,  # (in,) int64, negative where the probe saw only zeros
    rows: int,
) -> Tensor | None:
    """Fill in channels that were zero on the probe when all others say "row c feeds channel c"; else None."""
    known = row_of_channel >= 0
    channels = torch.arange(row_of_channel.shape[0], device=row_of_channel.device)
    if bool((row_of_channel[known] >= rows).any()):
        return None
    if bool(known.all()):
        return row_of_channel
    identity = row_of_channel.shape[0] == rows and bool((row_of_channel == channels)[known].all())
    return channels if identity else None
