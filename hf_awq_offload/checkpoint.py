"""What a checkpoint's files hold, by their headers: no tensor is read, nothing of it reaches a kernel unchecked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .formats import ZEROS_NAMES, StoredTensor, padded_minimum, stored_tensors

PACKED_SUFFIX = ".qweight"
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


def packed_prefixes(headers: Iterable[str]) -> list[str]:
    """Names of the linears that are stored packed."""
    return [name.removesuffix(PACKED_SUFFIX) for name in headers if name.endswith(PACKED_SUFFIX)]


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
        _check_tensor(stored, headers[stored], expected, padded_minimum(name, version, n), version, group_size)
    bias = f"{prefix}.bias"
    if linear.bias and bias not in headers:
        raise CheckpointError(f"{bias} is missing in the checkpoint; the model's linear has one.")
    if linear.bias and headers[bias].shape != (linear.out_features,):
        raise CheckpointError(f"{bias} is {headers[bias]}; expected the shape ({linear.out_features},).")
    dtype = headers[f"{prefix}.scales"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_tensor(
    name: str, found: TensorHeader, expected: StoredTensor, at_least: int, version: str, group_size: int
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
            f"{name} is {found}; expected {dtypes} ({sizes}) for version {version!r} and group size {group_size}. "
            "config.json and the tensors contradict each other: correct config.json, or download the checkpoint again."
        )
