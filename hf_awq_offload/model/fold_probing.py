"""Finds which scales can be folded away by measuring a decoder layer instead of listing architectures.

1. Linears that receive equal inputs form one *input group* and share s. Other parameters that multiply the same input
   (those of a router or of fused experts) are the group's *readers*.
2. The probe multiplies the output channels of every *producer* candidate (a norm's weight w, a norm that multiplies by
   1 + w, a linear's rows) by known factors. If an input channel c changes by exactly the factor of row r, for every
   token, then r feeds c, linearly. This finds q/k/v ← norm, down ← up, and o ← v with grouped queries (many c per r).
3. In linears that compute several things at once, only some rows feed an input. In a fused qkv the probe finds them
   with a single token, whose softmax is constant; in a fused gate and up they are one half, or every second row.
4. A fold is used only after a proof on the layer at hand: random scales, compensated in the consumers, must leave all
   outputs of the layer unchanged.

The same projection of all experts is probed at once. Probes run in fp32 and never write to the layer's weights, which
are cast and scaled where they are used (`cast_parameters.py`). The host waits for the device once per probe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import isfinite

import torch
from torch import Tensor, nn

from ..transfers import all_to_device, all_to_host, numbers_of
from .decoder_layers import ProbeCalls
from .experts import Routing, UnfusedExperts, expert_parts, routed
from .folds import NOT_EXACT, Fold, InputGroup, LayerStructure, ProducerKind, Reader, producer_scalings
from .input_groups import experts_beside, group_equal_inputs, parameter_shapes, readers_in, readers_of
from .linears import is_linear, linears_in
from .probe_runner import ProbeRunner
from .row_maps import LEVELS, complete_row_map, factor_index, level_factors, row_subsets
from .scalings import Scaling, Scalings

PROOF_SENSITIVITY = 1e-4
"""Least relative change of the output that scaling *without* compensation must cause for a proof to count …"""
PROOF_TOLERANCE = 1e-3
"""… and largest fraction of that change that may remain with compensation, unless it is below fp32 rounding."""
ROUNDING_CHANGE = 3e-6
"""Relative change of a layer's output that fp32 rounding alone may cause."""

CURVATURE = 0.01
"""Second difference of the output, relative to the first, above which a linear's effect counts as nonlinear."""
MAX_PAIRED = 4
"""Most linears that read one input for which pairs are tried."""

MAX_READER_CHOICES = 8
"""Most sets of parameters that are tried as a group's readers."""


Candidate = tuple[Fold, ...]
"""Producers of equal kind and rows that are scaled together: one norm or linear, or one projection of every expert."""


def discover_structure(layer: nn.Module, probes: ProbeCalls, device: torch.device, seed: int) -> LayerStructure:
    """Probes `layer` (on `device`) with one short forward per linear and norm, and a few more for each fold found."""
    return without_refuted_folds(layer, _found(layer, probes, device, seed), probes, device, seed)


def _found(layer: nn.Module, probes: ProbeCalls, device: torch.device, seed: int) -> LayerStructure:
    """Returns the groups, with folds that were proven with every expert at work."""
    with routed(layer, Routing.UNIFORM):  # so that every expert contributes to the output
        probe = _Probe(layer, probes, device, seed)
        inputs = probe.inputs({})
        on_host, reads_on_host = all_to_host(inputs), all_to_host(probe.reads)
        groups = [
            InputGroup(consumers, None, readers_of(on_host[consumers[0]], reads_on_host))
            for consumers in group_equal_inputs(on_host)
        ]
        groups = _with_folds(probe, inputs, groups)
        groups = _with_experts_joined(probe, inputs, on_host, groups)
        softmax_only = probe.without_influence_on_a_lone_token()
        softmax_only |= probe.factors_of_a_softmax([group.consumers for group in groups], softmax_only)
    return LayerStructure(tuple(groups), softmax_only)


def without_refuted_folds(
    layer: nn.Module, structure: LayerStructure, probes: ProbeCalls, device: torch.device, seed: int
) -> LayerStructure:
    """Returns `structure`, found on this layer or a similar one, without the folds that this layer's weights refute."""
    routings = [Routing.TOP_K]
    if any(isinstance(module, UnfusedExperts) for module in layer.modules()):
        routings.append(Routing.UNIFORM)
    for routing in routings:
        with routed(layer, routing):
            probe = _Probe(layer, probes, device, seed)
            folded = [group for group in structure.groups if group.fold is not None]
            if folded and not probe.proves(folded):
                refuted = [family for family in probe.families(folded) if not probe.proves(family)]
                refused = {group.consumers for family in refuted for group in family}
                kept = [
                    InputGroup(group.consumers, None, group.readers, NOT_EXACT) if group.consumers in refused else group
                    for group in structure.groups
                ]
                structure = LayerStructure(tuple(kept), structure.softmax_only)
            del probe  # before the next one: on a CPU each holds the layer in fp32
    return structure


class _Probe:
    """Runs one layer in fp32 with scaled parameters and observes its outputs and the inputs of its linears."""

    def __init__(self, layer: nn.Module, probes: ProbeCalls, device: torch.device, seed: int):
        self.layer = layer
        self.linears = linears_in(layer)
        self.experts = expert_parts(layer)
        self.runner = ProbeRunner(layer, device)
        self.parameters = dict(layer.named_parameters(remove_duplicate=False))
        self.probes = ProbeCalls(self.runner.on_device(probes.several), self.runner.on_device(probes.single))
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.reference = self.runner.observe(self.probes.several)
        self.reads: dict[Reader, Tensor] = {}

    def inputs(self, scalings: Scalings, lone: bool = False) -> dict[str, Tensor]:
        """Returns the input of every linear that ran, (tokens, in) fp32, in call order; of a single token if `lone`.

        Also stores the inputs of other parameters in `reads`.
        """
        seen: dict[str, Tensor] = {}
        self.reads = {}

        def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: seen.update({name: args[0].detach().reshape(-1, args[0].shape[-1])})

        def remember_read(name: str, shapes: Mapping[str, torch.Size]) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                for x in (*args, *kwargs.values()):
                    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2:
                        rows = x.detach().reshape(-1, x.shape[-1])
                        self.reads.update(dict.fromkeys(readers_in(name, shapes, x.shape[-1]), rows))
                        break

            return hook

        handles = [module.register_forward_pre_hook(remember(name)) for name, module in self.linears.items()]
        for name, module in self.layer.named_modules():
            shapes = {} if is_linear(module) else parameter_shapes(module)
            if any(len(shape) >= 2 for shape in shapes.values()):
                handles.append(module.register_forward_pre_hook(remember_read(name, shapes), with_kwargs=True))
        try:
            self.runner.observe(self.probes.single if lone else self.probes.several, scalings)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def candidates(self) -> list[Candidate]:
        """Returns everything that might absorb a scale, norms first, with the identity as its row map."""
        families: dict[tuple[str, ProducerKind], list[Fold]] = defaultdict(list)
        for name, module in self.layer.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter):
                continue
            if weight.ndim == 1:
                kinds = [ProducerKind.NORM, ProducerKind.NORM_PLUS_ONE]
            elif is_linear(module):
                kinds = [ProducerKind.ROWS]
            else:
                continue
            rows = weight.shape[0]
            for kind in kinds:
                families[self.family(name), kind].append(Fold(name, kind, torch.arange(rows), rows))
        return sorted(map(tuple, families.values()), key=lambda folds: folds[0].kind is ProducerKind.ROWS)

    def family(self, name: str) -> str:
        """Returns one common name for the same projection of all experts, and the own name of any other module."""
        return self.experts[name].family if name in self.experts else name

    def families(self, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
        """Collects the groups of the same projection of different experts."""
        families: dict[str, list[InputGroup]] = defaultdict(list)
        for group in groups:
            assert group.fold is not None
            families[f"{self.family(group.fold.producer)} -> {self.family(group.consumers[0])}"].append(group)
        return list(families.values())

    def proves(self, groups: Sequence[InputGroup]) -> bool:
        """Returns whether random scales on all of `groups`, compensated, leave the layer's outputs unchanged.

        The residual stream would mask an error of the linears, so the change is compared with the one that the same
        scales cause without compensation.
        """
        log_scales = [torch.rand(_fold_of(group).rows, generator=self.generator) * 2 - 1 for group in groups]
        factors: list[Tensor] = []
        for group, log_scale in zip(groups, log_scales, strict=True):
            row_scale = torch.where(_fold_of(group).fed_rows(), torch.exp(log_scale), 1.0)
            factors += [1 / row_scale, _fold_of(group).channel_scale(row_scale)]
        factors = all_to_device(factors, self.device)
        scalings: dict[str, list[Scaling]] = defaultdict(list)
        compensation: dict[str, Scaling] = {}
        for group, factor, channel_scale in zip(groups, factors[::2], factors[1::2], strict=True):
            for name, scaling in producer_scalings(self.parameters, _fold_of(group), factor).items():
                scalings[name].append(scaling)
            compensation.update({f"{consumer}.weight": Scaling(channel_scale[None]) for consumer in group.consumers})
            for reader in group.readers:
                ndim = self.parameters[reader.parameter].ndim
                compensation[reader.parameter] = Scaling(reader.multiplier(channel_scale, ndim))
        uncompensated = self._change(self.runner.observe(self.probes.several, scalings))
        for name, scaling in compensation.items():
            scalings[name].append(scaling)
        compensated = self._change(self.runner.observe(self.probes.several, scalings))
        allowed = max(PROOF_TOLERANCE * uncompensated, ROUNDING_CHANGE)
        return uncompensated >= PROOF_SENSITIVITY and compensated <= allowed

    def without_influence_on_a_lone_token(self) -> frozenset[str]:
        """Returns the linears that do not influence the output for a single token, where the softmax is constant."""
        reference = self.runner.observe(self.probes.single)
        families: dict[str, list[str]] = defaultdict(list)
        for name in self.inputs({}, lone=True):  # a linear that did not run proves nothing
            families[self.family(name)].append(name)
        without_influence: list[str] = []
        for names in families.values():
            rows = [self.parameters[f"{name}.weight"].shape[0] for name in names]
            factors = all_to_device([1.5 + torch.rand(n, generator=self.generator) for n in rows], self.device)
            scalings = {
                f"{name}.weight": [Scaling(factor.unsqueeze(1))] for name, factor in zip(names, factors, strict=True)
            }
            output = self.runner.observe(self.probes.single, scalings)
            if _equal(output, reference):  # exactly: the softmax of a single logit is 1.0
                without_influence += names
        return frozenset(without_influence)

    def factors_of_a_softmax(self, groups: Sequence[tuple[str, ...]], known: frozenset[str]) -> frozenset[str]:
        """Finds pairs of linears with one input whose outputs affect the layer only as a product, and nonlinearly.

        With an attention sink, the softmax of a single token is not constant, but q·c and k/c still act as q and k.
        """
        factors: set[str] = set()
        for consumers in groups:
            names = [name for name in consumers if name not in known and name not in self.experts]
            for first, second in combinations(names if len(names) <= MAX_PAIRED else [], 2):
                doubled = self.runner.observe(self.probes.several, self._multiplied(first, 2.0))
                changed = self._change(doubled)
                if changed < PROOF_SENSITIVITY:
                    continue
                opposed = self._multiplied(first, 2.0) | self._multiplied(second, 0.5)
                if self._change(self.runner.observe(self.probes.several, opposed)) > max(
                    PROOF_TOLERANCE * changed, ROUNDING_CHANGE
                ):
                    continue
                tripled = self.runner.observe(self.probes.several, self._multiplied(first, 3.0))
                outputs = list(zip(self.reference, doubled, tripled, strict=True))
                bent = sum((b - 2 * a + r).norm() for r, a, b in outputs)
                curvature, *moved = numbers_of([torch.as_tensor(bent), *((a - r).norm() for r, a, _ in outputs)])
                if curvature > CURVATURE * sum(moved):
                    factors |= {first, second}
        return frozenset(factors)

    def _multiplied(self, name: str, factor: float) -> dict[str, list[Scaling]]:
        """Returns the scalings that multiply a linear's parameters by `factor`."""
        names = [key for key in (f"{name}.weight", f"{name}.bias") if key in self.parameters]
        return {key: [Scaling(factor)] for key in names}

    def _change(self, outputs: Sequence[Tensor]) -> float:
        """Returns the largest ‖output - reference‖ / ‖reference‖ over all outputs, infinite if any is not finite."""
        changes = []
        for output, reference in zip(outputs, self.reference, strict=True):
            if output.shape != reference.shape:
                return float("inf")
            changes.append((output - reference).norm() / reference.norm().clamp(min=torch.finfo(reference.dtype).tiny))
        return max((change if isfinite(change) else float("inf") for change in numbers_of(changes)), default=0.0)


def _fold_of(group: InputGroup) -> Fold:
    assert group.fold is not None
    return group.fold


def _equal(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    """Returns whether all tensors are equal, with one wait for the device."""
    if any(a.shape != b.shape for a, b in zip(outputs, reference, strict=False)):
        return False
    return all(numbers_of([(a == b).all() for a, b in zip(outputs, reference, strict=False)]))


def _with_folds(
    probe: _Probe,
    inputs: Mapping[str, Tensor],
    groups: Sequence[InputGroup],  # with every possible reader
) -> list[InputGroup]:
    """Returns every group with the first producer that feeds all its channels and passes the proof, if there is one."""
    folded = list(groups)

    def try_rows(candidate: Candidate, inputs: Mapping[str, Tensor], rows: Tensor | None, lone: bool) -> None:
        members = {
            index: member
            for index, group in enumerate(folded)
            if group.fold is None and (member := _member_for(probe, candidate, group)) is not None
        }
        if not members:
            return
        fed = _rows_feeding(probe, candidate, inputs, folded, list(members), rows, lone)
        proposed = {
            index: InputGroup(
                folded[index].consumers,
                Fold(members[index].producer, candidate[0].kind, row_of_channel, candidate[0].rows),
                folded[index].readers,
            )
            for index, row_of_channel in fed.items()
        }
        for family in probe.families(list(proposed.values())):
            proven = _proven(probe, family)
            for index, group in proposed.items():
                folded[index] = proven.get(group.consumers, folded[index])

    candidates = probe.candidates()
    for candidate in candidates:
        try_rows(candidate, inputs, None, lone=False)
    widths = {inputs[group.consumers[0]].shape[1] for group in folded if group.fold is None}
    lone_inputs = probe.inputs({}, lone=True) if widths else {}
    for candidate in candidates:
        rows = candidate[0].rows
        if candidate[0].kind is ProducerKind.ROWS and any(rows > width for width in widths):
            try_rows(candidate, lone_inputs, None, lone=True)
            for subset in row_subsets(rows) if any(rows == 2 * width for width in widths) else []:
                try_rows(candidate, inputs, subset.to(probe.device), lone=False)
    return folded


def _with_experts_joined(
    probe: _Probe, inputs: Mapping[str, Tensor], on_host: Mapping[str, Tensor], groups: Sequence[InputGroup]
) -> list[InputGroup]:
    """Joins experts without a fold to the linears whose input they get in another form, where that yields a fold.

    Experts may get rows that were gathered, or multiplied by the router's scores.
    """
    open_groups = {index: group.consumers for index, group in enumerate(groups) if group.fold is None}
    joined = experts_beside(open_groups, on_host, probe.experts)
    kept: dict[int, InputGroup] = dict(enumerate(groups))
    for other, members in joined.items():
        consumers = [name for index in (other, *members) for name in groups[index].consumers]
        (group,) = _with_folds(probe, inputs, [InputGroup(tuple(consumers), None, groups[other].readers)])
        if group.fold is not None:
            kept[other] = group
            for index in members:
                del kept[index]
    return list(kept.values())


def _proven(probe: _Probe, family: Sequence[InputGroup]) -> dict[tuple[str, ...], InputGroup]:
    """Returns the groups of a family, by consumers, with the readers that make the proof succeed; empty if none do.

    Several sets of readers are tried, because a parameter that fits an input by its shape need not multiply it.
    """
    most = max(len(group.readers) for group in family)
    kept = [range(most), *(chosen for size in range(most) for chosen in combinations(range(most), size))]
    for chosen in kept[:MAX_READER_CHOICES]:
        groups = [
            InputGroup(group.consumers, group.fold, tuple(r for i, r in enumerate(group.readers) if i in chosen))
            for group in family
        ]
        if probe.proves(groups):
            return {group.consumers: group for group in groups}
    return {}


def _member_for(probe: _Probe, candidate: Candidate, group: InputGroup) -> Fold | None:
    """Returns the candidate's producer that could feed `group`: of the same expert, and not one of its consumers."""
    if any(member.producer in group.consumers for member in candidate):
        return None
    if len(candidate) == 1:
        return candidate[0]
    part = probe.experts.get(group.consumers[0])
    same = [] if part is None else [
        member for member in candidate if probe.experts[member.producer].expert_name == part.expert_name
    ]  # fmt: skip
    return same[0] if same else None


def _rows_feeding(
    probe: _Probe,
    candidate: Candidate,
    inputs: Mapping[str, Tensor],
    groups: Sequence[InputGroup],
    open_groups: list[int],
    subset: Tensor | None,  # (rows,) bool: rows that are scaled; None for all
    lone: bool,
) -> dict[int, Tensor]:
    """Maps the index of each group that `candidate` feeds entirely to the row that feeds each channel, (in,).

    Row indices are decoded digit by digit: each probe shows which of `LEVELS` factors a channel was multiplied by.
    """
    factors = level_factors(probe.device)
    total = candidate[0].rows
    rows = torch.arange(total, device=probe.device)
    decoded: dict[int, Tensor] = {}
    place = 1
    remaining = [index for index in open_groups if groups[index].consumers[0] in inputs]
    while remaining and (place == 1 or place < total):
        factor = factors[(rows // place) % LEVELS]
        if subset is not None:
            factor = torch.where(subset, factor, 1.0)
        scalings: dict[str, list[Scaling]] = {}
        for member in candidate:
            parts = producer_scalings(probe.parameters, member, factor)
            scalings |= {name: [scaling] for name, scaling in parts.items()}
        changed = probe.inputs(scalings, lone)
        digits: dict[int, Tensor] = {}
        fits: dict[int, Tensor] = {}
        for index in remaining:
            name = groups[index].consumers[0]
            if name in changed and changed[name].shape == inputs[name].shape:
                digits[index], fits[index] = factor_index(inputs[name], changed[name], factors)
        del changed  # before the next probe collects as many
        remaining = [index for index, fit in zip(fits, numbers_of(list(fits.values())), strict=True) if fit]
        for index in remaining:
            is_known = digits[index] >= 0
            decoded[index] = decoded.get(index, 0) + torch.where(is_known, digits[index] * place, -total * place)
        place *= LEVELS
    on_host = all_to_host({index: decoded[index] for index in remaining})
    complete = {index: complete_row_map(rows_of_channels, total) for index, rows_of_channels in on_host.items()}
    return {index: row_of_channel for index, row_of_channel in complete.items() if row_of_channel is not None}
