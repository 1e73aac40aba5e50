"""Checks the headers of a checkpoint's files, so that no tensor reaches a kernel unchecked. Reads no tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..formats.dtypes import DTYPES
from ..formats.grid import Grid
from ..formats.layouts import COMPRESSED_TENSORS, TensorLayout, find_tensors, names_in, tensors_of

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of scales that readers accept."""


class TensorHeader(NamedTuple):
    """A tensor in a file. `dtype` is torch's where DTYPES has it, else the file's spelling."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


class LinearFeatures(NamedTuple):
    """The features of a linear, and whether it has a bias."""

    in_features: int
    out_features: int
    bias: bool


def read_headers(
    files: Iterable[str] | None,
) -> dict[str, TensorHeader] | None:
    """Name -> header of every tensor in safetensors files; None if there are no files or one has another format.

    Raises:
        CheckpointError: a file is damaged.
    """
    headers = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    tensor = opened.get_slice(name)
                    dtype = tensor.get_dtype()
                    headers[name] = TensorHeader(DTYPES.get(dtype, dtype), tuple(tensor.get_shape()))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a safetensors file ({error}); download it again.") from error
    return headers or None


def packed_prefixes(
    headers: Iterable[str],
    tensor: str,  # name within the linear, as of the tensor that holds the integers
) -> list[str]:
    """Names of the linears that hold a tensor of this name."""
    return [name.removesuffix(f".{tensor}") for name in headers if name.endswith(f".{tensor}")]


def check_linear(
    prefix: str,  # the linear's name in the checkpoint
    features: LinearFeatures,
    headers: dict[str, TensorHeader],
    format: str,  # as in formats/layouts.py
    grid: Grid,
) -> torch.dtype:
    """Checks the tensors of one linear and returns the dtype of its scales.

    Raises:
        CheckpointError: a tensor of the linear is missing, or its dtype or shape contradicts config.json.
    """
    _refuse_permuted(prefix, headers, format)
    expected = tensors_of(format, features.in_features, features.out_features, grid)
    stored_names = find_tensors(format, headers, f"{prefix}.")
    for name, layout in expected.items():
        if name not in stored_names:
            raise CheckpointError(
                f"{prefix}.{name} is missing in the checkpoint; a linear in the format {format!r} has "
                f"{', '.join(expected)}. Check that the download is complete, and the quantization_config in "
                "config.json."
            )
        described = f"the format {format!r}, {grid.bits} bits and group size {grid.group_size}"
        _check_tensor(stored_names[name], headers[stored_names[name]], layout, described)
    _check_bias(prefix, features, headers)
    return cast(torch.dtype, headers[f"{prefix}.{names_in(format).scales}"].dtype)


def _refuse_permuted(prefix: str, headers: dict[str, TensorHeader], format: str) -> None:
    if format == COMPRESSED_TENSORS:
        name, origin = f"{prefix}.weight_g_idx", "actorder 'group'), which this package does not load"
        remedy = "Install compressed-tensors and leave loading to transformers."
    else:
        name, origin = f"{prefix}.g_idx", "GPTQ's desc_act), which the AWQ format does not have"
        remedy = "Load it with the tool that made it."
    if name in headers:
        raise CheckpointError(f"{name} is in the checkpoint: its input channels are permuted ({origin}. {remedy}")


def _check_bias(prefix: str, features: LinearFeatures, headers: dict[str, TensorHeader]) -> None:
    bias = f"{prefix}.bias"
    if features.bias and bias not in headers:
        raise CheckpointError(f"{bias} is missing in the checkpoint; the model's linear has one.")
    if features.bias and headers[bias].shape != (features.out_features,):
        raise CheckpointError(f"{bias} is {headers[bias]}; expected the shape ({features.out_features},).")


def _check_tensor(
    name: str,
    found: TensorHeader,
    expected: TensorLayout,
    described: str,  # what config.json says
) -> None:
    """Raises CheckpointError unless dtype and shape fit; a padded dimension may be larger."""
    fits = len(found.shape) == len(expected.shape) and all(
        size >= wanted if dimension == expected.padded else size == wanted
        for dimension, (size, wanted) in enumerate(zip(found.shape, expected.shape, strict=True))
    )
    accepted = _accepted_dtypes(expected.dtype)
    if found.dtype not in accepted or not fits:
        sizes = ", ".join(f"≥ {size}" if i == expected.padded else str(size) for i, size in enumerate(expected.shape))
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise CheckpointError(
            f"{name} is {found}; expected {dtypes} ({sizes}) for {described}. "
            "config.json and the tensors contradict each other: correct config.json, or download the checkpoint again."
        )


def _accepted_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that readers accept for a tensor that the format stores in `dtype`."""
    if dtype.is_floating_point:
        return FLOAT_DTYPES
    return (torch.int64, torch.int32) if dtype == torch.int64 else (dtype,)
