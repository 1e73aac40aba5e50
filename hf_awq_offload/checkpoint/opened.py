"""A quantized checkpoint as its files have it: where each tensor is, which linears are packed, on which grid.

No model is built. Names are those of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.quantization_config import AwqConfig

from ..errors import CheckpointError
from ..formats.awq import PackedWeight
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.awq_variants import ZEROS_NAMES
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from ..formats.grid_choice import GridChoice
from .layout_checks import TensorHeader, packed_prefixes
from .safetensors import ALL_DTYPES, INDEX_NAME, TensorPlace, read_tensor, tensor_places

CONFIG_NAME = "config.json"
AWQ, COMPRESSED_TENSORS = "awq", "compressed-tensors"


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a folder say."""

    folder: Path
    config: dict[str, Any]  # config.json
    places: dict[str, TensorPlace]  # of every tensor
    quantization: AwqCheckpointConfig | PackedCheckpointConfig | None  # None: full precision, or of another kind

    @property
    def format(self) -> str:
        """ "gemm", "gemv", "gemv_fast", "llm-awq", "compressed-tensors", "full precision", or another quant_method."""
        if isinstance(self.quantization, AwqCheckpointConfig):
            return self.quantization.version
        if isinstance(self.quantization, PackedCheckpointConfig):
            return COMPRESSED_TENSORS
        fields = quantization_fields(self.config)
        return "full precision" if fields is None else str(fields.get("quant_method"))

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        return {
            name: TensorHeader(ALL_DTYPES.get(place.dtype, place.dtype), place.shape)
            for name, place in self.places.items()
        }

    @cached_property
    def linears(self) -> list[str]:
        """Names of the packed linears."""
        if self.quantization is None:
            return []
        packed = "qweight" if isinstance(self.quantization, AwqCheckpointConfig) else "weight_packed"
        return sorted(packed_prefixes(self.places, packed))

    def tensors_of(self, linear: str) -> dict[str, str]:
        """Of a packed linear, name as in its layout -> name of the tensor in the files, as far as they are there."""
        if isinstance(self.quantization, AwqCheckpointConfig):
            names = {name: (name,) for name in PackedWeight._fields} | {"qzeros": ZEROS_NAMES}
        else:
            names = {name: (name,) for name in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")}
        found = {}
        for name, spellings in names.items():
            stored = next((f"{linear}.{each}" for each in spellings if f"{linear}.{each}" in self.places), None)
            if stored is not None:
                found[name] = stored
        return found

    def choice(self, linear: str) -> GridChoice | None:
        """The grid of a packed linear as config.json has it; None if that does not say that it is packed."""
        if isinstance(self.quantization, AwqCheckpointConfig):
            return self.quantization.choice
        assert self.quantization is not None
        return self.quantization.choice_for([linear], nn.Linear(1, 1, device="meta"))

    def read(self, name: str) -> Any:
        return read_tensor(self.places[name])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the headers of all files.

    Raises:
        CheckpointError: a file is missing or damaged, or config.json says what no reader understands.
    """
    config = read_json(folder / CONFIG_NAME)
    places: dict[str, TensorPlace] = {}
    for file in weight_files(folder):
        places |= tensor_places(file)
    return Checkpoint(folder, config, places, parsed_quantization(config))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        CheckpointError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files; expected model.safetensors, or shards of it.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: it is not there, or none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); get the checkpoint again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; expected a JSON object.")
    return found


def quantization_fields(config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of quantization; older tools wrote it as compression_config."""
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) else None


def parsed_quantization(config: dict[str, Any]) -> AwqCheckpointConfig | PackedCheckpointConfig | None:
    """None where the checkpoint is in full precision, or quantized by another method.

    Raises:
        CheckpointError: it is of a known method, and one that this package can't read.
    """
    fields = quantization_fields(config) or {}
    method = fields.get("quant_method")
    if method == AWQ:
        try:
            parsed = AwqConfig.from_dict({name: value for name, value in fields.items() if name != "quant_method"})
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"transformers refuses quantization_config: {error}. Correct config.json.") from error
        return AwqCheckpointConfig.from_awq_config(parsed)
    return PackedCheckpointConfig.from_dict(fields) if method == COMPRESSED_TENSORS else None


def index_problems(folder: Path) -> Iterator[str]:
    """What is wrong between the index of the shards, if there is one, and the files."""
    path = folder / INDEX_NAME
    files = {file.name: file for file in folder.glob("*.safetensors")}
    if not path.exists():
        if len(files) > 1:
            yield f"there are {len(files)} safetensors files and no {INDEX_NAME}"
        return
    try:
        entries = read_json(path)["weight_map"].items()
    except (CheckpointError, KeyError, AttributeError) as error:
        yield f"{INDEX_NAME} can't be read ({error})"
        return
    held = {}
    for name, file in files.items():
        try:
            held[name] = set(tensor_places(file))
        except CheckpointError:
            held[name] = set()  # it is reported by whoever opens it
    wanted: dict[str, set[str]] = {}
    for tensor, file_name in entries:
        wanted.setdefault(file_name, set()).add(tensor)
    for file_name, tensors in sorted(wanted.items()):
        if file_name not in held:
            yield f"{file_name}, which {INDEX_NAME} names, is missing with {len(tensors)} tensors"
        elif missing := sorted(tensors - held[file_name]):
            yield f"{file_name} lacks {len(missing)} of its tensors, such as {missing[0]}"
    for file_name, tensors in sorted(held.items()):
        if extra := sorted(tensors - wanted.get(file_name, set())):
            yield f"{file_name} holds {len(extra)} tensors that {INDEX_NAME} does not place there, such as {extra[0]}"
