"""The fold structures of a run's decoder layers: probed once for each kind of layer, proven on every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..model.decoder_layers import ProbeCalls, candidate_layers, shared_parameters
from ..model.fold_probing import discover_structure, without_refuted_folds
from ..model.folds import LayerStructure, structure_key, without_folds_of
from ..model.linears import linears_in
from .layer_context import LayerContext
from .left_out import reached


class Structures:
    """Finds which linears of a layer share an input, and what can absorb a scale of it.

    Made before any layer is changed: which layers are of a kind depends on their weights' shapes as they were.

    Args:
        model: the whole model.
        device: where the layers are when they are probed.
        seed: of the random factors that folds are probed with.
    """

    def __init__(self, model: nn.Module, device: torch.device, seed: int):
        self._device, self._seed = device, seed
        self._shared = shared_parameters(model)
        self._kinds = {name: structure_key(layer) for name, layer in candidate_layers(model).items()}
        self._discovered: dict[object, tuple[LayerStructure, int]] = {}
        """Kind of layer -> its structure, and which of the probes it was found on."""
        self._proven: dict[str, LayerStructure] = {}

    def of(self, context: LayerContext, probes: Sequence[ProbeCalls]) -> LayerStructure:
        """Returns the structure of a layer, which is on the device; a fold that it refutes is left out."""
        name = context.name
        if name not in self._proven:
            kind = self._kinds[name]
            is_known = kind in self._discovered
            structure, which = self._discovered[kind] if is_known else self._discover(context, kind, probes)
            for calls in probes[which + (not is_known) :]:  # on samples as well: a layer may treat images differently
                structure = without_refuted_folds(context.layer, structure, calls, self._device, self._seed)
            self._proven[name] = without_folds_of(structure, self._shared[name])
        return self._proven[name]

    def knows(self, name: str) -> bool:
        """Whether a layer of this kind was probed."""
        return self._kinds[name] in self._discovered

    def first_of_kind(self, name: str, names: Sequence[str]) -> str:
        """Returns the first of `names` that is of the same kind as `name`."""
        return next(other for other in names if self._kinds[other] == self._kinds[name])

    def _discover(
        self, context: LayerContext, kind: object, probes: Sequence[ProbeCalls]
    ) -> tuple[LayerStructure, int]:
        """Probes on text, and on a sample as well if text does not reach every linear; says which it was."""
        for which, calls in enumerate(probes):
            structure = discover_structure(context.layer, calls, self._device, self._seed)
            if kind not in self._discovered or len(reached(structure)) > len(reached(self._discovered[kind][0])):
                self._discovered[kind] = structure, which
            if linears_in(context.layer).keys() <= reached(structure):  # whatever the recipe quantizes of this layer
                break
        return self._discovered[kind]
