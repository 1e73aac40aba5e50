"""Compares a source's tensors with the model that is to take them: what is missing, what does not fit, what is left.

transformers draws weights at random where a checkpoint lacks them, and drops tensors that a model has no place for.
Neither may happen to a model that is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..errors import CheckpointError
from ..messages import shortened

MOST_NAMED = 6


@dataclass
class SourceFit:
    """How a source's tensors and a model's parameters correspond."""

    placed: dict[str, str] = field(default_factory=dict)
    """Parameter or buffer of the model -> the tensor that it is as stored, under another name at most."""
    converted: set[str] = field(default_factory=set)
    """Parameters that transformers computes from other tensors, by merging or splitting them."""
    unplaced: list[str] = field(default_factory=list)
    """Tensors of the source that the model has no place for."""
    contested: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Parameter or buffer of the model -> two tensors that it would be, of which transformers takes one."""


def fit(model: PreTrainedModel, names: Iterable[str], conversions: Sequence[Any]) -> SourceFit:
    """Renames the source's tensors as transformers will, and looks them up in the model.

    Args:
        model: on the meta device, as it is about to be loaded.
        names: those of the source's tensors.
        conversions: transformers' renamings and converters for the model.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found = SourceFit()
    for name in sorted(names, key=dot_natural_key):  # some renamings apply once another one has been seen
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            found.unplaced.append(name)
        elif pattern is None:
            if renamed in found.placed:
                found.contested[renamed] = (found.placed[renamed], name)
            found.placed[renamed] = name
        else:
            found.converted |= set(_targets(renamed, by_pattern[pattern]))
    return found


def _targets(first: str, converter: WeightConverter) -> Iterator[str]:
    """Yields all parameters that a converter makes, given the first of them."""
    for target in converter.target_patterns:
        yield first.replace(converter.target_patterns[0], target)


def require_all_weights(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], found: SourceFit) -> None:
    """Checks that no weight would be drawn at random; `shapes` are those of the source's tensors.

    A head that is no part of the language model, such as that of a classifier, may be missing: it is to be trained.

    Raises:
        CheckpointError: the source lacks a weight, has it in another shape, or has two for one.
    """
    state = model.state_dict()
    for name, (first, second) in found.contested.items():
        raise CheckpointError(
            f"The checkpoint holds {first} and {second}, and both are {name} of {type(model).__name__}; expected one. "
            "Remove the one that is not wanted."
        )
    missing = [name for name in _missing(model, found) if _is_of_language_model(model, name)]
    if missing:
        raise CheckpointError(
            f"The checkpoint holds no {shortened(missing, MOST_NAMED)}; expected every weight of "
            f"{type(model).__name__}, or it would be filled with random numbers. Download the checkpoint again, or "
            "correct its config.json if that describes another model."
        )
    for name, stored_name in found.placed.items():
        expected, stored = tuple(state[name].shape), tuple(shapes[stored_name])
        if expected != stored and not _is_scalar(expected, stored):
            raise CheckpointError(
                f"{stored_name} has the shape {stored} in the checkpoint; {type(model).__name__} expects {expected} by "
                "config.json. Correct config.json, or download the checkpoint again."
            )


def _is_scalar(expected: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    return {expected, stored} == {(), (1,)}


def _missing(model: PreTrainedModel, found: SourceFit) -> list[str]:
    """Returns parameters that neither the source nor a tie gives a value, without those that may be missing."""
    there = found.placed.keys() | found.converted
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    there |= {name for name, source in tied.items() if source in there}
    there |= {source for name, source in tied.items() if name in there}
    values: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        values.setdefault(id(parameter), []).append(name)
    for names in values.values():  # a module that stands at several places
        if there & set(names):
            there |= set(names)
    may_be_missing = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name, _ in model.named_parameters()
        if name not in there and not any(pattern.search(name) for pattern in may_be_missing)
    ]


def _is_of_language_model(model: PreTrainedModel, name: str) -> bool:
    prefix = model.base_model_prefix
    if not prefix or not hasattr(model, prefix) or name.startswith(f"{prefix}."):
        return True
    head: Any = model.get_output_embeddings()
    return any(parameter is model.get_parameter(name) for parameter in ([] if head is None else head.parameters()))
