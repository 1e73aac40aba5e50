"""Checks the values of the recipe's fields.

Each function takes the value of one field. It raises a ConfigError that says which field it is, what was found and
what to pass; `checked_...` functions return the value in the form in which the recipe keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from .errors import ConfigError
from .formats.name_patterns import fault_in


def check_is_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ConfigError unless `value` is in `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} is {value!r}; pass one of {', '.join(map(repr, allowed))}.")


def check_flag(name: str, value: Any) -> None:
    """ConfigError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; pass True or False.")


def check_integer(
    name: str,
    value: Any,
    minimum: int,
    remedy: str,  # what to pass
    maximum: int | None = None,
) -> None:
    """ConfigError unless `value` is an integer (not a bool) from `minimum` to `maximum`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        raise ConfigError(f"{name} is {value!r}; pass {remedy}.")


def check_folder(name: str, value: Any) -> None:
    """ConfigError unless `value` is a path that is not empty, or None."""
    if value is None:
        return
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} is {value!r}; pass the path of a folder, or None.")
    if not os.fspath(value):
        raise ConfigError(f"{name} is an empty string; pass the path of a folder, or None.")
    try:
        is_path = b"\0" not in os.fsencode(value)
    except UnicodeError:
        is_path = False
    if not is_path:
        raise ConfigError(f"{name} is {value!r}, which no file system has; pass the path of a folder, or None.")


def check_dataset(dataset: Any) -> None:
    """ConfigError if `dataset` can't be calibration data, whatever it holds."""
    if dataset is None or isinstance(dataset, bool | int | float | complex | bytes):
        raise ConfigError(
            f"dataset is {dataset!r}; pass 'builtin', a list of texts, token ids, a datasets.Dataset, a "
            "path or a dataset name. To quantize without data, set n_grid=0, clip=False and rounding='nearest'."
        )
    if isinstance(dataset, str) and not dataset.strip():
        raise ConfigError("dataset is an empty string; pass 'builtin', a path or a dataset name.")


def check_text_column(text_column: Any) -> None:
    """ConfigError unless `text_column` is a name or None."""
    if text_column is not None and not (isinstance(text_column, str) and text_column):
        raise ConfigError(f"text_column is {text_column!r}; pass the name of a column, or None.")


def check_tokenizer(tokenizer: Any) -> None:
    """ConfigError unless `tokenizer` is one, a name, a path or None."""
    if isinstance(tokenizer, str) and not tokenizer.strip():
        raise ConfigError("tokenizer is an empty string; pass a name or path, or None for the checkpoint's own.")
    if not (tokenizer is None or isinstance(tokenizer, str | os.PathLike) or callable(tokenizer)):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}; pass a tokenizer, its name or path, or None for the "
            "checkpoint's own."
        )


def checked_module_names(names: Any) -> list[str] | None:
    """`modules_to_not_convert` as a list of its own."""
    if names is None:
        return None
    if not isinstance(names, list | tuple | set | frozenset):
        raise ConfigError(f"modules_to_not_convert is {names!r}; pass a list of module names.")
    checked = list(names)
    if not all(isinstance(name, str) and name for name in checked):
        raise ConfigError(
            f"modules_to_not_convert is {checked!r}; every entry must be a non-empty string, such as 'lm_head'."
        )
    for name in checked:
        fault = fault_in(name)
        if fault is not None:
            raise ConfigError(
                f"modules_to_not_convert has the entry {name[:200]!r}, which is not a valid regular expression "
                f"({fault}); pass names of modules, with a backslash before characters such as brackets."
            )
    return checked


def checked_memory_limits(limits: Any) -> dict[str, int | str] | None:
    """`max_memory` with devices as torch spells them -> bytes."""
    if limits is None:
        return None
    if not isinstance(limits, Mapping):
        raise ConfigError(
            f"max_memory is {limits!r}; pass a dict such as {{'cuda:0': '8GiB', 'cpu': '32GiB'}}, or None."
        )
    checked: dict[str, int | str] = {}
    for device, limit in limits.items():
        try:
            if isinstance(device, bool) or not isinstance(device, str | int):
                raise TypeError(f"a {type(device).__name__}")
            name = str(torch.device(device))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"max_memory is {limits!r}: torch does not know the device {device!r} ({str(error).splitlines()[0]}); "
                "pass devices such as 'cpu' or 'cuda:0'."
            ) from error
        try:
            limit_bytes = convert_file_size_to_int(limit)
            if isinstance(limit, bool) or limit_bytes <= 0:
                raise ValueError("not a positive size")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(
                f"max_memory is {limits!r}: {limit!r} is not a size; pass a positive number of bytes, or a text such "
                "as '8GiB'."
            ) from error
        checked[name] = int(limit_bytes)
    return checked


def checked_device(device: Any) -> str | None:
    """`execution_device` as torch spells it; torch must know it and the machine must have it."""
    if device is None:
        return None
    try:
        if not isinstance(device, str | int | torch.device):
            raise TypeError(f"a {type(device).__name__}")
        parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"execution_device is {device!r}, which torch does not know ({str(error).splitlines()[0]}); pass "
            "'cuda', 'cuda:1', 'xpu', 'mps', 'cpu', or None for the accelerator if there is one."
        ) from error
    if parsed.type == "cpu":
        return str(parsed)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    if accelerator is None or accelerator.type != parsed.type or (parsed.index or 0) >= count:
        has = "none" if accelerator is None else f"{count} of type {accelerator.type!r}"
        raise ConfigError(
            f"execution_device is {device!r}, but this machine's accelerators are: {has}. Pass 'cpu' or None."
        )
    return str(parsed)
