"""Assembles a streamed checkpoint from the journal's files, the source and what the model has in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.safetensors import TensorPlace, tensor_places, write_shards
from ..checkpoint.stored_tensor import CarriedTensor, write_all
from ..errors import StorageError
from ..formats.name_patterns import ancestors
from ..logs import without_progress_bars
from ..model.decoder_layers import candidate_layers
from ..offload.journal import Journal
from ..offload.stored_weights import StoredWeights
from ..pipeline.run_storage import ToCheckpoint
from .hub import complete

LARGE_BYTES = 1 << 23
"""Tensors outside the decoder layers that are larger than this are handled one by one."""


def assemble(
    directory: Path,
    model: PreTrainedModel,
    journal: Journal,
    weights: StoredWeights,
    to_checkpoint: ToCheckpoint,
    carried: Mapping[str, CarriedTensor],
    max_shard_size: int | str,
    repo_id: str | None,
) -> None:
    """Writes the checkpoint: tensors from the journal and the source, and the files `save_pretrained` adds to them.

    Args:
        directory: where; the folder above it takes pieces on the way.
        model: quantized; its layers released.
        journal: holds the quantized layers.
        weights: the source's weights, by their names in the model.
        to_checkpoint: renames and converts tensors as `save_pretrained` does.
        carried: tensors of the source that the model has no place for, by their names there.
        max_shard_size: as in `save_pretrained`.
        repo_id: the future repository, for the model card.

    Raises:
        StorageError: a file can't be written; the journal stays usable.
    """
    try:
        _save_what_is_no_tensor(directory, model)
        commits = sorted(journal.commits.values(), key=lambda commit: commit.index)
        places = {name: place for commit in commits for name, place in tensor_places(commit.file).items()}
        for index, names in enumerate(_groups_outside(model, set(journal.commits))):
            unchanged = _places_unchanged(model, weights, names, to_checkpoint)
            if unchanged is None:
                piece = directory.parent / f"rest-{index:05}.safetensors"
                tensors = to_checkpoint({name: _value(model, weights, name) for name in names})
                save_file({name: value.contiguous() for name, value in tensors.items()}, piece, {"format": "pt"})
                unchanged = tensor_places(piece)
            places |= unchanged
        places |= _places_of_carried(directory.parent, carried, model.dtype)
        buffers = {name for name, _ in model.named_buffers()}
        total_parameters = sum(math.prod(place.shape) for name, place in places.items() if name not in buffers)
        write_shards(directory, places, max_shard_size, total_parameters)
        complete(model, directory, repo_id)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"The checkpoint can't be written to {directory}: {error}. All layers are quantized: make room, and "
            "repeat the call."
        ) from error


def _save_what_is_no_tensor(directory: Path, model: PreTrainedModel) -> None:
    """Writes config.json and the like with `save_pretrained`; call it first, because it deletes existing shards."""
    quantizer = model.__dict__.pop("hf_quantizer")  # with it, save_pretrained would save all of the model's tensors
    try:
        with without_progress_bars():  # transformers would count 0 shards
            type(model).save_pretrained(model, directory, state_dict={})  # the model's own would add the card too early
    finally:
        cast(Any, model).hf_quantizer = quantizer


def _groups_outside(model: PreTrainedModel, done: set[str]) -> Iterator[list[str]]:
    """Yields names of tensors outside quantized layers: one list per layer, per large tensor, and for the rest."""
    layers = [name for name in candidate_layers(model) if name not in done]
    rest = {name: value for name, value in model.state_dict().items() if not _is_in(name, done)}
    for layer in layers:
        yield [name for name in rest if _is_in(name, {layer})]
    outside = {name: value for name, value in rest.items() if not _is_in(name, set(layers))}
    large = {name for name, value in outside.items() if value.numel() * value.element_size() > LARGE_BYTES}
    for name in sorted(large):
        yield [name]
    yield [name for name in outside if name not in large]


def _is_in(name: str, modules: set[str]) -> bool:
    return any(module in modules for module in ancestors(name))


def _places_unchanged(
    model: PreTrainedModel, weights: StoredWeights, names: list[str], to_checkpoint: ToCheckpoint
) -> dict[str, TensorPlace] | None:
    """Maps names in the checkpoint to where the source has these very bytes; None if they have to be computed."""
    values = {name: cast(Tensor, model.get_parameter_or_buffer(name)) for name in names}
    source = {id(value): name for name, value in reversed(values.items()) if value.is_meta and name in weights.places}
    places = {}
    for name, value in to_checkpoint(values).items():
        if id(value) not in source or not weights.is_as_stored(source[id(value)]):
            return None
        places[name] = cast(TensorPlace, weights.places[source[id(value)]])
    return places


def _places_of_carried(
    scratch: Path, carried: Mapping[str, CarriedTensor], dtype: torch.dtype
) -> dict[str, TensorPlace]:
    """Returns where the carried tensors are; those that no file has as they are to be are written to `scratch`."""
    places = {name: stored for name, stored in carried.items() if isinstance(stored, TensorPlace)}
    others = {name: stored for name, stored in carried.items() if name not in places}
    if others:
        piece = scratch / "carried.safetensors"
        write_all(piece, others, dtype)
        places |= tensor_places(piece)
    return places


def _value(model: PreTrainedModel, weights: StoredWeights, name: str) -> Tensor:
    value = cast(Tensor, model.get_parameter_or_buffer(name))
    return weights.read(name) if value.is_meta else value.detach()
