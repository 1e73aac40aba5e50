"""What stays in full precision, and why: linears that calibration does not reach, matrices that no linear holds."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..model.decoder_layers import candidate_layers
from ..model.folds import LayerStructure
from ..model.fused_experts import refusals
from ..model.linears import linears_in, matrices_outside_linears
from ..report import QuantizationReport
from .layer_context import LayerContext

NEEDS_OTHER_DATA = "did not run in calibration: needs samples with images"


def layers_left_out(
    report: QuantizationReport, model: nn.Module, is_quantizable: Callable[[str], bool]
) -> dict[str, str]:
    """Returns linears of layers that did not run, and matrices that are no linears -> why they are left out."""
    left_out: dict[str, str] = {}
    ran = dict.fromkeys(layer.name for layer in report.layers)
    for name in ran:
        left_out |= {f"{name}.{part}": why for part, why in matrices_left_out(model.get_submodule(name)).items()}
    lists = {name.rpartition(".")[0] for name in ran}
    for name, layer in candidate_layers(model).items():
        among_others = name.rpartition(".")[0] in lists
        reason = NEEDS_OTHER_DATA if among_others else "does not run on text alone: not part of the decoder"
        for part in linears_in(layer) if name not in ran else []:
            if is_quantizable(f"{name}.{part}"):
                left_out[f"{name}.{part}"] = reason
    return left_out


def matrices_left_out(layer: nn.Module) -> dict[str, str]:
    """Returns what in a layer may be multiplied by activations but is not a linear -> what it is, and why it stays."""
    refused = refusals(layer)
    described = matrices_outside_linears(layer)
    for name in described:
        reason = refused.get(name, refused.get(name.rpartition(".")[0]))
        if reason is not None:
            described[name] += f": {reason}"
    return described


def not_reached(context: LayerContext, structure: LayerStructure) -> dict[str, str]:
    """Returns the linears of a layer that no calibration token reached -> what the report says of them."""
    left = context.quantizable - reached(structure)
    return {f"{context.name}.{name}": "did not run in calibration" for name in sorted(left)}


def reached(structure: LayerStructure) -> set[str]:
    """Returns the linears that calls of the layer reached when it was probed."""
    return {name for group in structure.groups for name in group.consumers}
