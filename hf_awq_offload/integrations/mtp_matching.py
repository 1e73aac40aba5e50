"""Finds the decoder layer among a checkpoint's tensors for multi-token prediction (MTP), and puts it into the model.

What it is called differs (model.layers.46, mtp.layers.0), so it is found by its structure: names and shapes, less a
prefix, are those of one of the model's own decoder layers in the same checkpoint. The stem (model/mtp_layer.py) is
found by the role that its norms' names say and by its shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import StoredTensor
from ..formats.name_patterns import ancestors
from ..logs import get_logger
from ..model.decoder_layers import candidate_layers
from ..model.linears import linears_in
from ..model.mtp_layer import MtpLayer, StemTensors, add_copy, norm_of
from .carrying import mtp_tensors
from .linear_choice import renaming_of
from .source_fit import SourceFit, fit

logger = get_logger(__name__)

Tensors = Mapping[str, StoredTensor]
EMBEDDING_NORM = re.compile(r"(^|\.)(enorm|pre_fc_norm_embedding)\.weight$")
HIDDEN_NORM = re.compile(r"(^|\.)(hnorm|pre_fc_norm_hidden)\.weight$")
EMBEDDINGS = re.compile(r"(^|\.)\w*embed\w*\.weight$")


class NoMatchError(Exception):
    """Says why the layers for multi-token prediction can't be quantized."""


@dataclass(frozen=True)
class _Match:
    prefix: str  # of the tensors in the checkpoint, with its dot
    twin: str  # the model's layer that they are like, by its name in the model
    twin_prefix: str
    names: Mapping[str, str]  # within the layer: parameter or buffer -> tensor


def place_mtp_layer(
    model: PreTrainedModel, source: Source, found: SourceFit, conversions: Sequence[Any]
) -> tuple[MtpLayer | None, SourceFit]:
    """Puts the decoder layer for multi-token prediction into the model, so that transformers loads it as well.

    A warning says which tensors for multi-token prediction stay in full precision because no layer, or more than one,
    is found among them.

    Args:
        model: on the meta device.
        source: the checkpoint.
        found: how its tensors correspond to the model's.
        conversions: transformers' renamings and converters for the model.

    Returns:
        The layer, and how the tensors correspond to those of the model that has it.
    """
    names = mtp_tensors(model, found)
    if not names:
        return None, found
    tensors = {name: source.tensors[name] for name in names}
    try:
        first, *others = _matches(model, tensors, found)
        layer = _placed(model, tensors, first, others)
        fitting = fit(model, source.tensors, conversions)
        try:
            _require_same_names(model, layer, first, fitting)
        except NoMatchError:
            layer.remove()
            raise
    except NoMatchError as reason:
        logger.warning(
            f"The tensors for multi-token prediction, such as {names[0]}, stay in full precision despite "
            f"mtp='quantize': {reason}."
        )
        return None, found
    if others:
        logger.warning(
            f"Only the first layer for multi-token prediction is quantized, {layer.name}. What enters "
            f"{', '.join(match.prefix.removesuffix('.') for match in others)} depends on how a server chains them; "
            "they stay in full precision."
        )
    return layer, fitting


def _matches(model: PreTrainedModel, tensors: Tensors, found: SourceFit) -> list[_Match]:
    """Returns the decoder layers among `tensors`, first one first.

    Raises:
        NoMatchError: there are none.
    """
    matches: dict[str, _Match] = {}
    for twin, twin_prefix, names in _layouts(model, found):
        layout = {tensor: tuple(model.get_parameter_or_buffer(f"{twin}.{own}").shape) for own, tensor in names.items()}
        anchor = min(layout)
        for name in tensors:
            prefix = name.removesuffix(anchor)
            if name.endswith(f".{anchor}") and prefix not in matches and _is_layer(prefix, layout, tensors):
                matches[prefix] = _Match(prefix, twin, twin_prefix, names)
    if not matches:
        raise NoMatchError("none of the model's decoder layers has tensors of such names and shapes")
    return [matches[prefix] for prefix in sorted(matches, key=_in_order)]


def _in_order(prefix: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in prefix.split(".")]


def _layouts(model: PreTrainedModel, found: SourceFit) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields the model's decoder layers, last one first, that the checkpoint holds under names with a common prefix.

    Each is its name, the prefix, and parameter or buffer within the layer -> the rest of the tensor's name.
    """
    inside: dict[str, list[str]] = {name: [] for name in reversed(candidate_layers(model))}
    for key in model.state_dict():
        inside.get(next((name for name in ancestors(key) if name in inside), ""), []).append(key)
    for name, keys in inside.items():
        if any(key not in found.placed for key in keys):
            continue
        stored = {key.removeprefix(f"{name}."): found.placed[key] for key in keys}
        if prefix := _common_prefix(stored.values()):
            yield name, prefix, {own: tensor.removeprefix(prefix) for own, tensor in stored.items()}


def _common_prefix(names: Collection[str]) -> str:
    """Returns the modules that all names begin with, with a dot behind them; "" if there are none."""
    parts = [name.split(".")[:-1] for name in names] or [[]]
    common: list[str] = []
    for one, other in zip(min(parts), max(parts), strict=False):
        if one != other:
            break
        common.append(one)
    return ".".join([*common, ""]) if common else ""


def _is_layer(prefix: str, layout: Mapping[str, tuple[int, ...]], tensors: Tensors) -> bool:
    """Whether the tensors under a prefix are those of a layer, beside others that are no part of the same modules."""
    under = {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}
    if any(tensor not in under or tuple(under[tensor].shape) != shape for tensor, shape in layout.items()):
        return False
    parts = {tensor.partition(".")[0] for tensor in layout}
    return all(name in layout or name.partition(".")[0] not in parts for name in under)


def _placed(model: PreTrainedModel, tensors: Tensors, match: _Match, others: Sequence[_Match]) -> MtpLayer:
    """Adds the layer to the model.

    Raises:
        NoMatchError: what computes its inputs is not known, or there is no room for it.
    """
    stack, _, index = match.prefix.removesuffix(".").rpartition(".")
    same_stack = stack == match.twin_prefix.removesuffix(".").rpartition(".")[0]
    name = f"{match.twin.rpartition('.')[0]}.{index}" if same_stack else f"{stack}.{index}"
    stored = {f"{match.prefix}{rest}": tensors[f"{match.prefix}{rest}"] for rest in match.names.values()}
    of_others = tuple(other.prefix for other in others)
    rest = {key: value for key, value in tensors.items() if key not in stored and not key.startswith(of_others)}
    stem = _stem(model, match, rest)
    try:
        return MtpLayer(name, match.twin, stem, stored, add_copy(model, match.twin, name))
    except ValueError as error:
        raise NoMatchError(str(error)) from error


def _stem(model: PreTrainedModel, match: _Match, rest: Tensors) -> StemTensors:
    """Looks for the stem beside the layer's tensors, then further and further above them."""
    parts = match.prefix.split(".")[:-1]
    for length in range(len(parts), -1, -1):
        scope = ".".join([*parts[:length], ""]) if length else ""
        within = {name: stored for name, stored in rest.items() if name.startswith(scope)}
        norms = [name for role in (EMBEDDING_NORM, HIDDEN_NORM) if (name := _only(filter(role.search, within)))]
        if len(norms) == 2:
            return _stem_among(model, model.get_submodule(match.twin), within, norms)
    raise NoMatchError("the norms of its inputs (enorm and hnorm, or pre_fc_norm_…) are not among them")


def _stem_among(model: PreTrainedModel, twin: nn.Module, within: Tensors, norms: list[str]) -> StemTensors:
    embeddings = cast(Any, model).get_input_embeddings().weight.shape
    hidden_size = embeddings[-1]
    projections = [name for name, stored in within.items() if tuple(stored.shape) == (hidden_size, 2 * hidden_size)]
    projection = _only(projections)
    if projection is None or not projection.endswith(".weight"):
        raise NoMatchError(f"expected one matrix of the shape {(hidden_size, 2 * hidden_size)} that makes its inputs")
    if any(tuple(within[norm].shape) != (hidden_size,) for norm in norms) or norm_of(twin, hidden_size) is None:
        raise NoMatchError("the norms of its inputs are not like those of the model's layers")
    if unknown := _beside([*norms, projection], within):
        raise NoMatchError(f"{unknown} is not known to take part in its inputs")
    own = [name for name in within if EMBEDDINGS.search(name) and tuple(within[name].shape) == tuple(embeddings)]
    embedding_norm, hidden_norm = norms
    bias = within.get(f"{projection.removesuffix('.weight')}.bias")
    own_embeddings = _only(own)
    return StemTensors(
        within[projection],
        bias,
        within[embedding_norm],
        within[hidden_norm],
        None if own_embeddings is None else within[own_embeddings],
    )


def _beside(weights: Collection[str], within: Tensors) -> str | None:
    """Returns a tensor of the modules of `weights` that is neither of them nor the bias of the last, a linear."""
    modules = {name.removesuffix(".weight") for name in weights}
    known = {*weights, f"{[*weights][-1].removesuffix('.weight')}.bias"}
    return next((name for name in within if name.rpartition(".")[0] in modules and name not in known), None)


def _only(names: Iterable[str]) -> str | None:
    found = list(names)
    return found[0] if len(found) == 1 else None


def _require_same_names(model: PreTrainedModel, layer: MtpLayer, match: _Match, fitting: SourceFit) -> None:
    """Raises NoMatchError unless transformers loads the layer from its tensors, and saves it under the same names."""
    for own, rest in match.names.items():
        if fitting.placed.get(f"{layer.name}.{own}") != f"{match.prefix}{rest}":
            raise NoMatchError(f"transformers would not load {match.prefix}{rest} as {layer.name}.{own}")
    renaming = renaming_of(model)
    for own in linears_in(model.get_submodule(layer.name)):
        stored_name = fitting.placed.get(f"{layer.name}.{own}.weight", "").removesuffix(".weight")
        if renaming.name_in_checkpoint(f"{layer.name}.{own}") != stored_name:
            raise NoMatchError(f"transformers would not save {layer.name}.{own} as {stored_name}")
