"""What a checkpoint's files hold, by their headers: no tensor is read, nothing of it reaches a kernel unchecked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..formats.awq_variants import FLOAT_DTYPES, ZEROS_NAMES, StoredTensor, padded_minimum, stored_tensors
from ..formats.grid import Grid
from ..formats.pack_quantized import words_for

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class TensorHeader(NamedTuple):
    """A tensor of a file: `dtype` as torch's if torch has it, else as the file spells it."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


class LinearShape(NamedTuple):
    """A linear of the model."""

    in_features: int
    out_features: int
    bias: bool


def read_headers(
    files: Iterable[str] | None,
) -> dict[str, TensorHeader] | None:
    """Name -> header of every tensor in safetensors files; None where there are none, or one is not safetensors.

    Raises:
        CheckpointError: a file is damaged.
    """
    headers = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    tensor = opened.get_slice(name)
                    dtype = tensor.get_dtype()
                    headers[name] = TensorHeader(DTYPES.get(dtype, dtype), tuple(tensor.get_shape()))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a safetensors file ({error}); download it again.") from error
    return headers or None


def packed_prefixes(
    headers: Iterable[str],
    tensor: str,  # name of the tensor that holds the integers
) -> list[str]:
    """Names of the linears that are stored packed."""
    return [name.removesuffix(f".{tensor}") for name in headers if name.endswith(f".{tensor}")]


def check_packed_linear(
    prefix: str,  # the linear's name in the checkpoint
    linear: LinearShape,
    headers: dict[str, TensorHeader],
    grid: Grid,
) -> torch.dtype:
    """As `check_linear`, of the pack-quantized layout."""
    if f"{prefix}.weight_g_idx" in headers:
        raise CheckpointError(
            f"{prefix}.weight_g_idx is in the checkpoint: its input channels are permuted (actorder 'group'), which "
            "this package does not load. Install compressed-tensors and leave loading to transformers."
        )
    n = linear.in_features // grid.group_size
    expected = {
        "weight_packed": StoredTensor((torch.int32,), (linear.out_features, words_for(linear.in_features, grid.bits))),
        "weight_scale": StoredTensor(FLOAT_DTYPES, (linear.out_features, n)),
        "weight_zero_point": StoredTensor((torch.int32,), (words_for(linear.out_features, grid.bits), n)),
        "weight_shape": StoredTensor((torch.int64, torch.int32), (2,)),
    }
    if not grid.zero_point:
        del expected["weight_zero_point"]
    for name, tensor in expected.items():
        stored = f"{prefix}.{name}"
        if stored not in headers:
            raise CheckpointError(
                f"{stored} is missing in the checkpoint; a linear of {grid.bits} bits has {', '.join(expected)}. Check "
                "that the download is complete, and the config_groups in config.json."
            )
        _check_tensor(stored, headers[stored], tensor, 0, f"{grid.bits} bits and group size {grid.group_size}")
    _check_bias(prefix, linear, headers)
    return _dtype_of(headers[f"{prefix}.weight_scale"])


def check_linear(
    prefix: str,  # the linear's name in the checkpoint
    linear: LinearShape,
    headers: dict[str, TensorHeader],
    version: str,
    group_size: int,  # resolved
) -> torch.dtype:
    """Returns the dtype of the linear's scales.

    Raises:
        CheckpointError: a tensor of the linear is missing, or its dtype or shape contradicts config.json.
    """
    if f"{prefix}.g_idx" in headers:
        raise CheckpointError(
            f"{prefix}.g_idx is in the checkpoint: its input channels are permuted (GPTQ's desc_act), which the AWQ "
            "format does not have. Load it with the tool that made it."
        )
    n = linear.in_features // group_size
    for name, expected in stored_tensors(version, linear.in_features, linear.out_features, group_size).items():
        names = ZEROS_NAMES if name == "qzeros" else (name,)
        stored = next((f"{prefix}.{name}" for name in names if f"{prefix}.{name}" in headers), None)
        if stored is None:
            raise CheckpointError(
                f"{prefix}.{name} is missing in the checkpoint; a quantized linear of version {version!r} has qweight, "
                "qzeros and scales. Check that the download is complete, and the version in config.json."
            )
        described = f"version {version!r} and group size {group_size}"
        _check_tensor(stored, headers[stored], expected, padded_minimum(name, version, n), described)
    _check_bias(prefix, linear, headers)
    return _dtype_of(headers[f"{prefix}.scales"])


def _check_bias(prefix: str, linear: LinearShape, headers: dict[str, TensorHeader]) -> None:
    bias = f"{prefix}.bias"
    if linear.bias and bias not in headers:
        raise CheckpointError(f"{bias} is missing in the checkpoint; the model's linear has one.")
    if linear.bias and headers[bias].shape != (linear.out_features,):
        raise CheckpointError(f"{bias} is {headers[bias]}; expected the shape ({linear.out_features},).")


def _dtype_of(header: TensorHeader) -> torch.dtype:
    assert isinstance(header.dtype, torch.dtype)
    return header.dtype


def _check_tensor(
    name: str,
    found: TensorHeader,
    expected: StoredTensor,
    at_least: int,
    described: str,  # what config.json says
) -> None:
    """CheckpointError unless dtype and shape fit; a padded size (None) is `at_least` as said."""
    fits = len(found.shape) == len(expected.shape) and all(
        size >= at_least if wanted is None else size == wanted
        for size, wanted in zip(found.shape, expected.shape, strict=True)
    )
    if found.dtype not in expected.dtypes or not fits:
        sizes = ", ".join(f"≥ {at_least}" if size is None else str(size) for size in expected.shape)
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected.dtypes)
        raise CheckpointError(
            f"{name} is {found}; expected {dtypes} ({sizes}) for {described}. "
            "config.json and the tensors contradict each other: correct config.json, or download the checkpoint again."
        )
