"""Adds tensors to a checkpoint that has been written: one file more, and an index that names all tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .durable import replacing
from .safetensors import INDEX_NAME, WEIGHTS_NAME, tensor_places
from .stored_tensor import CarriedTensor, require_unchanged, write_all

SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def add_tensors(folder: Path, tensors: Mapping[str, CarriedTensor], dtype: torch.dtype) -> None:
    """Adds those of `tensors` that the checkpoint does not hold yet, one at a time in memory.

    Args:
        folder: holds model.safetensors, or shards and their index.
        tensors: by their names in the checkpoint. What a file or memory holds is copied byte by byte.
        dtype: of what is dequantized.

    Raises:
        CheckpointError: `folder` holds no such checkpoint, or a source file is gone or has changed.
        OSError: a file can't be written.
    """
    if not tensors:
        return
    shards, weight_map, metadata = _shards_of(folder)
    added = {name: stored for name, stored in tensors.items() if name not in weight_map}
    if not added:
        return
    require_unchanged(added)
    total = len(shards) + 1
    file = folder / f"model-{total:05}-of-{total:05}.safetensors"
    write_all(file, added, dtype)
    renamed = {shard: f"model-{number:05}-of-{total:05}.safetensors" for number, shard in enumerate(shards, 1)}
    size = sum(place.end - place.start for place in tensor_places(file).values())
    index = {
        "metadata": metadata | {"total_size": metadata["total_size"] + size},
        "weight_map": {name: renamed[shard] for name, shard in weight_map.items()} | dict.fromkeys(added, file.name),
    }
    for shard, name in renamed.items():
        os.replace(folder / shard, folder / name)
    with replacing(folder / INDEX_NAME) as partial:
        partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_older(file: Path, other: Path) -> bool:
    """Whether an index is a leftover: `save_pretrained` leaves it beside the one file that replaces all shards."""
    return other.is_file() and file.stat().st_mtime_ns < other.stat().st_mtime_ns


def _shards_of(folder: Path) -> tuple[list[str], dict[str, str], dict[str, int]]:
    """Returns the names of the files, tensor -> file, and the index's metadata with at least the total size."""
    if (folder / INDEX_NAME).is_file() and not _is_older(folder / INDEX_NAME, folder / WEIGHTS_NAME):
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        weight_map = dict(index["weight_map"])
        shards = sorted(set(weight_map.values()))
        if all(SHARD.fullmatch(shard) for shard in shards):
            return shards, weight_map, dict(index.get("metadata") or {})
    elif (folder / WEIGHTS_NAME).is_file():
        places = tensor_places(folder / WEIGHTS_NAME)
        size = sum(place.end - place.start for place in places.values())
        return [WEIGHTS_NAME], dict.fromkeys(places, WEIGHTS_NAME), {"total_size": size}
    raise CheckpointError(
        f"{folder} holds neither {WEIGHTS_NAME} nor shards of it, so the tensors that the model has no place for can't "
        "be added. Save the model under save_pretrained's own file names."
    )
