"""The text of a journal's commit: sealed with a digest of itself when it is written, checked when it is read.

The digest finds damage. It proves nothing about who wrote the commit, so a file's name in it has to be the one that the
layer's index gives, and sizes have to be those of the tensors: otherwise a journal from strangers could have the run
delete or map any file of this machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..json_text import parse_json
from ..report import LayerReport

HIDDEN_DTYPES = ("float64", "float32", "bfloat16", "float16")
COMMIT_NAME = re.compile(r"layer-(\d{5,})\.json", re.ASCII)


def layer_name(index: int) -> str:
    """Returns the name of the file with the tensors of the layer of this index."""
    return f"layer-{index:05}.safetensors"


def hidden_name(index: int) -> str:
    """Returns the name of the file with what enters the layer of this index."""
    return f"hidden-{index:05}.bin"


def sealed(entry: Mapping[str, Any]) -> str:
    """Returns a commit as text, with a digest of itself."""
    text = json.dumps(entry)
    return json.dumps({"commit": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def unsealed(path: Path) -> dict[str, Any]:
    """Returns the commit in a file with what `sealed` made.

    Raises:
        ValueError: it was changed, or says what no run writes.
    """
    outer = _object("the file", parse_regular(path))
    text = outer.get("commit")
    if not isinstance(text, str):
        raise ValueError("it has no commit")
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != outer.get("sha256"):
        raise ValueError("its digest differs")
    entry = _object("the commit", parse_json(text, unique_keys=True))
    index, named = entry.get("index"), COMMIT_NAME.fullmatch(path.name)
    if type(index) is not int or named is None or int(named[1]) != index:
        raise ValueError(f"its index is {index!r}")
    if not isinstance(entry.get("name"), str) or not _is_count(entry.get("batch_tokens")):
        raise ValueError("its name or batch_tokens are missing")
    _check_file(_object("tensors", entry.get("tensors")), layer_name(index))
    if entry["hidden"] is not None:
        _check_hidden(_object("hidden", entry["hidden"]), hidden_name(index + 1))
    _check_report(_object("report", entry.get("report")), entry["name"])
    return entry


def parse_regular(path: Path) -> Any:
    """Returns the JSON value in a file of the journal; raises ValueError if it is none, or a link or pipe."""
    if path.is_symlink() or not path.is_file():
        raise ValueError("it is not a regular file")
    return parse_json(path.read_bytes(), unique_keys=True)


def _check_file(entry: Mapping[str, Any], name: str) -> None:
    if entry.get("file") != name or not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
        raise ValueError(f"it names the file {str(entry.get('file'))[:200]!r}; expected {name}, its size and digest")


def _check_hidden(entry: Mapping[str, Any], name: str) -> None:
    _check_file(entry, name)
    shapes, dtype = entry.get("shapes"), entry.get("dtype")
    if dtype not in HIDDEN_DTYPES:
        raise ValueError(f"its hidden states are {dtype!r}")
    if not isinstance(shapes, list) or not all(
        isinstance(shape, list) and len(shape) > 1 and all(map(_is_count, shape)) for shape in shapes
    ):
        raise ValueError("the shapes of its hidden states are no lists of sizes")
    if sum(math.prod(shape) for shape in shapes) * getattr(torch, dtype).itemsize != entry["bytes"]:
        raise ValueError(f"its hidden states do not fill {entry['bytes']} bytes")


def _check_report(report: Mapping[str, Any], name: str) -> None:
    """Checks what the pipeline reads; see `RunStorage.store_layer`."""
    if "choices" in report:
        left_out = _object("left_out", report.get("left_out"))
        if not all(isinstance(reason, str) for reason in (*left_out.values(), report.get("choices"))):
            raise ValueError("its choices are missing")
        _check_memory(_object("memory", report.get("memory", {})))
        layer = _object("layer", report.get("layer"))
        groups = layer.get("groups")
        if layer.get("name") != name or not isinstance(groups, list | tuple):
            raise ValueError("its report is of another layer")
        for group in groups:
            consumers = _object("a group", group).get("consumers")
            if not isinstance(consumers, list | tuple) or not all(isinstance(linear, str) for linear in consumers):
                raise ValueError("a group has no linears")
        LayerReport.from_dict(dict(layer))  # TypeError if a field is missing or unknown


def _check_memory(memory: Mapping[str, Any]) -> None:
    most = memory.get("chunk_elements")
    are_sizes = most is None or (_is_count(most) and most > 0)
    are_places = all(type(memory.get(name, False)) is bool for name in ("statistics_in_ram", "grams_in_ram"))
    if not (are_sizes and are_places and isinstance(memory.get("device", ""), str)):
        raise ValueError(f"what memory it had left is {str(memory)[:200]}")


def _object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
