"""Opens a quantized checkpoint: where each tensor is, which linears are packed, on which grid.

No model is built. Names are those in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.quantization_config import AwqConfig

from ..errors import CheckpointError
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from ..formats.dtypes import DTYPES
from ..formats.grid_choice import GridChoice
from ..formats.layouts import COMPRESSED_TENSORS, find_tensors, names_in
from ..json_text import parse_json
from .layout_checks import TensorHeader, packed_prefixes
from .safetensors import INDEX_NAME, TensorPlace, read_tensor, tensor_places

CONFIG_NAME = "config.json"
AWQ = "awq"
MAX_JSON_BYTES = 100_000_000
"""An index of a million tensors is smaller."""
FILE_NAME = re.compile(r"(?!\.)[^/\\:]{1,255}")
"""Matches the name of a file in the index's own folder, on any system."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config.json and the headers of its files."""

    folder: Path
    config: dict[str, Any]  # config.json
    places: dict[str, TensorPlace]  # of every tensor
    quantization: AwqCheckpointConfig | PackedCheckpointConfig | None  # None: full precision, or of another kind

    @property
    def format(self) -> str:
        """ "gemm", "gemv", "gemv_fast", "llm-awq", "compressed-tensors", "full precision", or another quant_method."""
        if self.quantization is not None:
            return self.quantization.layout
        fields = quantization_fields(self.config)
        return "full precision" if fields is None else str(fields.get("quant_method"))

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        return {
            name: TensorHeader(DTYPES.get(place.dtype, place.dtype), place.shape) for name, place in self.places.items()
        }

    @cached_property
    def linears(self) -> list[str]:
        """Names of the packed linears."""
        if self.quantization is None:
            return []
        return sorted(packed_prefixes(self.places, names_in(self.format).integers))

    def tensors_of(self, linear: str) -> dict[str, str]:
        """Name in the linear's layout -> name in the files, for each tensor of a packed linear that is there."""
        return find_tensors(self.format, self.places, f"{linear}.")

    def choice(self, linear: str) -> GridChoice | None:
        """The grid of a packed linear according to config.json; None if config.json leaves the linear out."""
        if isinstance(self.quantization, AwqCheckpointConfig):
            return self.quantization.choice
        assert self.quantization is not None
        return self.quantization.choice_for([linear], nn.Linear(1, 1, device="meta"))

    def read(self, name: str) -> Any:
        return read_tensor(self.places[name])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json and the headers of all files.

    Raises:
        CheckpointError: a file is missing or damaged, or this package can't read the quantization config.
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


def read_json(path: Path, unique_keys: bool = False) -> dict[str, Any]:
    """Reads a JSON object; see `parse_json` for `unique_keys`.

    Raises:
        CheckpointError: the file can't be read, or holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is not a regular file")
        with path.open("rb") as opened:
            text = opened.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it is longer than {MAX_JSON_BYTES} bytes")
        value = parse_json(text, unique_keys=unique_keys)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); download the checkpoint again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def quantization_fields(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization config in config.json; older tools called it compression_config."""
    entry = config.get("quantization_config") or config.get("compression_config")
    return entry if isinstance(entry, dict) else None


def require_fields(config: dict[str, Any]) -> None:
    """Raises CheckpointError if config.json has a quantization config that is no object and so says nothing."""
    for name in ("quantization_config", "compression_config"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(
                f"{name} in config.json is {str(config[name])[:200]!r}; expected a JSON object. Correct config.json."
            )


def parsed_quantization(config: dict[str, Any]) -> AwqCheckpointConfig | PackedCheckpointConfig | None:
    """The quantization config; None if the checkpoint is in full precision or quantized by another method.

    Raises:
        CheckpointError: the method is known, but this package can't read the rest.
    """
    fields = quantization_fields(config) or {}
    require_fields(config)
    method = fields.get("quant_method")
    if method == AWQ:
        try:
            parsed = AwqConfig.from_dict({name: value for name, value in fields.items() if name != "quant_method"})
        except Exception as error:  # of any kind: transformers does not check what the fields hold
            raise CheckpointError(f"transformers refuses quantization_config: {error}. Correct config.json.") from error
        return AwqCheckpointConfig.from_awq_config(parsed)
    return PackedCheckpointConfig.from_dict(fields) if method == COMPRESSED_TENSORS else None


def weight_map(index: Path) -> dict[str, str]:
    """Returns tensor -> file, as the index of a checkpoint with several files has it.

    Raises:
        CheckpointError: the file can't be read, or is no such index; or it names a file outside its own folder.
    """
    entries = read_json(index, unique_keys=True).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; download the checkpoint again.")
    for file in set(entries.values()):
        if not FILE_NAME.fullmatch(file) or not file.isprintable() or len(file.encode()) > 255:
            raise CheckpointError(
                f"{index} names the file {file[:300]!r}; expected names of files beside it. Don't use this checkpoint: "
                "it reaches out of its folder."
            )
    return entries


def index_problems(folder: Path) -> Iterator[str]:
    """Contradictions between the index of the shards, if there is one, and the files."""
    path = folder / INDEX_NAME
    files = {file.name: file for file in folder.glob("*.safetensors")}
    if not path.exists():
        if len(files) > 1:
            yield f"there are {len(files)} safetensors files and no {INDEX_NAME}"
        return
    try:
        entries = weight_map(path).items()
    except CheckpointError as error:
        yield f"{INDEX_NAME} can't be read ({error})"
        return
    held = {}
    for name, file in files.items():
        try:
            held[name] = set(tensor_places(file))
        except CheckpointError:
            held[name] = set()  # opening it reports the damage
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
