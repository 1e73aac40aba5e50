"""Reads safetensors files tensor by tensor, and writes tensors into new files, all at the level of bytes.

The format (huggingface.co/docs/safetensors): 8 bytes with the header's length (little endian), the header as JSON
({name: {"dtype", "shape", "data_offsets": [start, end]}} and "__metadata__"), then the tensors without gaps.

The library's own reader maps whole files into memory, so a checkpoint counts against a limit on address space. It also
holds the interpreter's lock while it copies, so reading ahead in a thread would stop everything else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..errors import CheckpointError
from ..formats.dtypes import DTYPES, shape_in_torch, size_bytes
from ..json_text import parse_json

MAX_HEADER_BYTES = 100_000_000
"""The library's limit, too; a longer header means that this is another kind of file."""
MAX_SIZE = 2**63 - 1
"""The largest size of a dimension and offset that torch and the system take."""
MAX_NAME_CHARACTERS = 1000
LFS_POINTER = b"version https://git-lfs"
"""What the text begins with that stands in the place of a file that git-lfs keeps."""
COPY_BYTES = 1 << 22
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

WIDEST_FIRST = [
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "I8", "U8", "BOOL"),
]


class TensorPlace(NamedTuple):
    """The position of a tensor's bytes in a file."""

    file: Path
    dtype: str  # as the format spells it
    shape: tuple[int, ...]
    start: int  # in the file
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def tensor_places(file: str | os.PathLike[str]) -> dict[str, TensorPlace]:
    """Name -> place of every tensor in a safetensors file.

    What the library refuses is refused here, too: tensors that share bytes, gaps between them, and bytes after the last
    one. Readers would disagree about such files, and a small one could ask for any amount of memory.

    Raises:
        CheckpointError: the file can't be read, is not a safetensors file, or has another size than its header says.
    """
    path = Path(file)
    try:
        if not path.is_file():  # a folder, or a pipe, which would be waited for
            raise ValueError("it is missing, or not a regular file")
        with path.open("rb") as opened:
            first_bytes = opened.read(8)
            if first_bytes == LFS_POINTER[:8]:
                raise CheckpointError(
                    f"{path} is a git-lfs pointer, not the file itself. Fetch the file: `git lfs pull` in "
                    "the repository, or `hf download`."
                )
            length = int.from_bytes(first_bytes, "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            size = os.fstat(opened.fileno()).st_size
            if size < 8 + length:
                raise ValueError(f"{size} bytes, where its header alone takes {length}")
            header = parse_json(opened.read(length), strict=True)
        places = _places(path, header, 8 + length, size)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read: {error.strerror or error}. Correct its permissions, or download it again."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}); download it again.") from error
    return places


def _places(path: Path, header: Any, first: int, size: int) -> dict[str, TensorPlace]:
    """Returns the places of a file of `size` bytes whose tensors begin at byte `first`; ValueError if that can't be."""
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    metadata = {} if header.get("__metadata__") is None else header["__metadata__"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a dict of texts")
    places = {name: _place(path, name, entry, first) for name, entry in header.items() if name != "__metadata__"}
    end = first
    for name, place in sorted(places.items(), key=lambda entry: entry[1][3:]):
        if place.start != end:
            raise ValueError(f"{name} begins at byte {place.start}, and the tensor before it ends at {end}")
        end = place.end
    if size != end:
        raise ValueError(f"{size} bytes, where the header says {end}")
    return places


def _place(path: Path, name: str, entry: Mapping[str, Any], first: int) -> TensorPlace:
    """Returns the place of a tensor whose offsets count from byte `first`; ValueError if its entry is impossible."""
    if not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:  # it would be printed, and written to the result
        raise ValueError(f"a tensor is called {name[:80]!r}")
    if not isinstance(entry["shape"], list) or not isinstance(entry["data_offsets"], list):
        raise ValueError(f"{name} has the entry {str(entry)[:200]}")
    (start, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    numbers = (start, end, *shape)
    if not all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers) or not isinstance(dtype, str):
        raise ValueError(f"{name} has the entry {str(entry)[:200]}")
    if math.prod(max(size, 1) for size in shape) > MAX_SIZE:  # with a dimension of 0, any size would fit
        raise ValueError(f"{name} has the shape {list(shape)}")
    if start > end or (dtype in DTYPES and size_bytes(dtype, shape) != end - start):
        raise ValueError(f"{name} is {dtype} of the shape {list(shape)}, but has {end - start} bytes")
    return TensorPlace(path, dtype, shape, first + start, first + end)


def read_tensor(place: TensorPlace, pin_memory: bool = False) -> Tensor:
    """Reads a tensor into memory of its own, without mapping the file or holding the interpreter's lock.

    Raises:
        CheckpointError: the file is gone or has become shorter, or torch lacks the tensor's dtype.
    """
    if place.dtype not in DTYPES:
        raise CheckpointError(f"{place.file} holds a tensor of dtype {place.dtype}, which this package can't read.")
    shape = shape_in_torch(place.dtype, place.shape)
    tensor = torch.empty(shape, dtype=place.torch_dtype, pin_memory=pin_memory)
    view = bytes_of(tensor)
    try:
        with place.file.open("rb", buffering=0) as opened:
            opened.seek(place.start)
            done = 0
            while done < len(view):
                count = opened.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{place.file} ends within a tensor; download it again.")
                done += count
    except OSError as error:
        raise CheckpointError(f"{place.file} can't be read any more ({error}); put it back.") from error
    return tensor


def bytes_of(
    tensor: Tensor,  # contiguous, on the CPU
) -> memoryview:
    """A view of a tensor's memory."""
    return memoryview(cast(Any, tensor.detach().reshape(-1).view(torch.uint8).numpy()))


def write_shards(
    directory: Path,
    places: Mapping[str, TensorPlace],  # by the tensors' names
    max_shard_size: str | int,
    total_parameters: int,
) -> None:
    """Copies tensors byte by byte into the files that `save_pretrained` would write, with an index if several.

    It holds no tensor in memory.
    """
    named = {name: torch.empty(places[name].shape, dtype=places[name].torch_dtype, device="meta") for name in places}
    split = split_torch_state_dict_into_shards(
        {name: named[name] for name in sorted(named, key=_natural)},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        _join(directory / file, {name: places[name] for name in names})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": total_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")


def _join(target: Path, places: Mapping[str, TensorPlace]) -> None:
    """Writes one file, in the library's order: wide dtypes first, so that all tensors are aligned, then by name."""
    with writing(target, {name: (place.dtype, place.shape) for name, place in places.items()}) as file:
        for name in file.names:
            file.copy(name, places[name])


class TensorFile:
    """A safetensors file that is being written: the header on construction, then the tensors in any order."""

    def __init__(self, opened: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]]):
        def order(name: str) -> tuple[int, str]:
            return WIDEST_FIRST.index(tensors[name][0]), name

        self.names: Sequence[str] = sorted(tensors, key=order)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self.names:
            dtype, shape = tensors[name]
            size = size_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        first = 8 + len(encoded)
        self._opened = opened
        self._ranges = {name: tuple(first + at for at in header[name]["data_offsets"]) for name in self.names}

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor with the dtype and shape that were announced; CheckpointError if it has another size."""
        start, end = self._ranges[name]
        data = bytes_of(tensor.contiguous())
        if len(data) != end - start:
            raise CheckpointError(
                f"{name} has {len(data)} bytes, and {end - start} were announced for it: the checkpoint contradicts "
                "itself. Download it again."
            )
        self._opened.seek(start)
        self._opened.write(data)

    def copy(self, name: str, place: TensorPlace) -> None:
        """Copies a tensor from another file, byte by byte."""
        self._opened.seek(self._ranges[name][0])
        with place.file.open("rb") as source:
            source.seek(place.start)
            left = place.end - place.start
            while left:
                block = source.read(min(left, COPY_BYTES))
                if not block:
                    raise CheckpointError(f"{place.file} ends within {name}; it was changed meanwhile.")
                self._opened.write(block)
                left -= len(block)


@contextmanager
def writing(
    target: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],  # name -> dtype as the format spells it, shape
    flush: bool = True,
) -> Iterator[TensorFile]:
    """Opens a file for these tensors; write or copy all of them inside. On exit flushes it to the disk, if asked to."""
    with target.open("wb") as opened:
        yield TensorFile(opened, tensors)
        opened.flush()
        if flush:
            os.fsync(opened.fileno())


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
