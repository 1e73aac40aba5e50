"""Warns, before a run starts, of decoder layers that would stay in full precision for the most part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..config import AwqOffloadConfig
from ..formats.name_patterns import NUMBER
from ..logs import get_logger
from ..model.decoder_layers import candidate_layers
from ..model.linears import LEAST_SIDE
from ..pipeline.left_out import matrices_left_out
from .linear_choice import ON_PURPOSE

logger = get_logger(__name__)

WARNED_SHARE = 0.1
"""Share of the decoder layers' weights in full precision above which a run warns."""
LEAST_SHOWN_SHARE = 0.005
MOST_SHOWN = 8


@dataclass(frozen=True)
class DenseShare:
    """What of the decoder layers' matrices stays in full precision although the config does not say so."""

    total_elements: int
    dense_elements: dict[tuple[str, str], int]
    """(Name with * for numbers, reason) -> elements."""

    @classmethod
    def of(cls, model: PreTrainedModel, recipe: AwqOffloadConfig, left_out: Mapping[str, str]) -> DenseShare:
        """Counts the elements of matrices; `left_out` holds the linears that stay in full precision -> why."""
        total, dense = 0, defaultdict[tuple[str, str], int](int)
        for layer_name, layer in _text_layers(model).items():
            total += _matrix_elements(layer)
            reasons = {f"{layer_name}.{name}": reason for name, reason in matrices_left_out(layer).items()}
            reasons |= {
                name: reason
                for name, reason in left_out.items()
                if name.startswith(f"{layer_name}.") and reason not in ON_PURPOSE
            }
            for name, reason in reasons.items():
                if should_convert_module(name, recipe.modules_to_not_convert or []):
                    dense[NUMBER.sub("*", name), reason] += _elements_under(layer, name.removeprefix(f"{layer_name}."))
        return cls(total, dict(dense))

    @property
    def share(self) -> float:
        return sum(self.dense_elements.values()) / max(self.total_elements, 1)

    def warn(self) -> None:
        """Warns if the share is larger than WARNED_SHARE."""
        if self.share <= WARNED_SHARE:
            return
        by_size = sorted(self.dense_elements.items(), key=lambda entry: -entry[1])
        large = [entry for entry in by_size if entry[1] >= LEAST_SHOWN_SHARE * self.total_elements] or by_size
        shown = [
            f"{name} ({reason}; {elements / self.total_elements:.0%})"
            for (name, reason), elements in large[:MOST_SHOWN]
        ]
        more = f", and {len(by_size) - len(shown)} more" if len(by_size) > len(shown) else ""
        logger.warning(
            f"{self.share:.0%} of the decoder layers' weights stay in full precision, because they can't be taken "
            f"apart into linears or packed: {', '.join(shown)}{more}. The checkpoint will be larger than its bits "
            "suggest. Stop the run if that is not worth it; name them in modules_to_not_convert to accept it silently."
        )


def _text_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the layers of the text decoder; a model's towers are not quantized."""
    layers = candidate_layers(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(part) for part in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    return {name: layer for name, layer in layers.items() if id(layer) in inside} or layers


def _matrix_elements(module: nn.Module) -> int:
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if parameter.ndim >= 2 and sorted(parameter.shape)[-2] >= LEAST_SIDE
    )


def _elements_under(
    layer: nn.Module,
    name: str,  # of a module or parameter in the layer
) -> int:
    parent_name, _, last = name.rpartition(".")
    parameter = layer.get_submodule(parent_name)._parameters.get(last)
    return _matrix_elements(layer.get_submodule(name)) if parameter is None else parameter.numel()
