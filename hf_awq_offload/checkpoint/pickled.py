"""Looks into the files of a checkpoint that PyTorch has pickled (.bin), without reading their tensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.dtypes import SPELLINGS
from ..formats.source import StoredHeader, source_format


def pickled_shapes(files: Sequence[Path], fields: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by its name.

    Args:
        files: all of the checkpoint's.
        fields: the quantization config, if config.json has one.

    Raises:
        CheckpointError: a file is damaged or holds something else than tensors, or the weights are quantized.
    """
    headers: dict[str, StoredHeader] = {}
    for file in files:
        for name, value in _loaded(file).items():
            if isinstance(value, Tensor):
                headers[str(name)] = StoredHeader(SPELLINGS.get(value.dtype, str(value.dtype)), tuple(value.shape))

    def refuse(name: str | None = None) -> NoReturn:
        raise CheckpointError(
            f"The weights in {files[0].name} are quantized; expected such weights in safetensors files. Save the "
            "checkpoint in that format with the tool that made it."
        )

    if fields or source_format(headers, None, refuse) is not None:
        refuse()
    return {name: header.shape for name, header in headers.items()}


def _loaded(file: Path) -> Mapping[Any, Any]:
    """Returns what a file holds, tensors on the meta device; nothing but tensors is unpickled."""
    try:
        loaded = torch.load(file, map_location="meta", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete file of tensors ({str(error).splitlines()[0]}); download it again."
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected tensors by name.")
    return loaded
