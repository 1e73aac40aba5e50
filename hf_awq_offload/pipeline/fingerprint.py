"""What the result of a quantization depends on: a run resumes only from a journal that says the same.

    source   sizes, and a digest: every tensor's name, dtype, shape and file, and 4 KiB from its start, middle and end
    model    class, dtype and config
    recipe   the fields that change a number in every layer; not where and how fast the checkpoint is made
    data     sizes, and a digest of token ids and masks of all calibration sequences

Which linears are quantized, and on which grid, is noted with each layer (layer_choices.py).

Reading all of a large checkpoint would take minutes at every start. A file that was trained further, converted or
replaced differs in every tensor. An edit of a tensor between the three places goes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.dataset import CalibrationSet
from ..checkpoint.safetensors import bytes_of, tensor_places
from ..config import AwqOffloadConfig
from ..errors import CheckpointError

SAMPLE_BYTES = 4096

HOW_NOT_WHAT = (
    *("dataset", "tokenizer", "text_column", "n_samples", "max_seq_len"),  # covered by the token ids
    *("execution_device", "batch_tokens", "backend", "offload", "prefetch", "max_memory"),
    *("checkpoint_dir", "report_dir"),
)
BY_LAYER = ("modules_to_not_convert", "overrides")


def fingerprint(
    model: PreTrainedModel,
    recipe: AwqOffloadConfig,
    calibration: CalibrationSet | None,
    files: Iterable[Path],
    source_format: str | None = None,
) -> dict[str, Any]:
    """Returns the parts of the fingerprint: name of a part -> JSON value. Of the data, it holds sizes and a digest.

    `source_format` says how the source is quantized, which config.json may decide; None: it is in full precision.
    """
    config = model.config.to_dict()
    for name in ("quantization_config", "transformers_version", "_name_or_path"):
        config.pop(name, None)
    what = {name: value for name, value in recipe.to_dict().items() if name not in (*HOW_NOT_WHAT, *BY_LAYER)}
    return {
        "package": version("hf_awq_offload"),
        "source": {**_source(files), "quantization": source_format},
        "model": {"class": type(model).__name__, "dtype": str(model.dtype), "config": config},
        "recipe": what | {"format": recipe.checkpoint_format},  # "auto" depends on the overrides
        "data": None if calibration is None else _data(calibration),
    }


def require_same_source(parts: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Raises CheckpointError if the files are no longer those of which `fingerprint` made `parts`.

    This also notices a file that was replaced by one of the same size and time.
    """
    before = parts["source"]
    if before != {**before, **_source(files)}:
        raise CheckpointError(
            f"The checkpoint's files were replaced while they were in use: their digest is not {before['sha256'][:16]} "
            "any more. The result would be made of two checkpoints, so it is not written. Put the files back and "
            "repeat the call, or start over with the new ones, in another checkpoint_dir."
        )


def _source(files: Iterable[Path]) -> dict[str, Any]:
    digest, tensors, size_bytes = hashlib.sha256(), 0, 0
    for file in sorted(files, key=lambda path: path.name):
        size_bytes += file.stat().st_size
        with file.open("rb") as opened:
            for name, place in sorted(tensor_places(file).items()):
                tensors += 1
                digest.update(repr((file.name, name, place.dtype, place.shape, place.start, place.end)).encode())
                middle = (place.start + place.end) // 2
                for start in (place.start, middle, max(place.start, place.end - SAMPLE_BYTES)):
                    opened.seek(start)
                    digest.update(opened.read(min(SAMPLE_BYTES, place.end - start)))
    return {"tensors": tensors, "bytes": size_bytes, "sha256": digest.hexdigest()}


def _data(calibration: CalibrationSet) -> dict[str, Any]:
    """Digests everything in a calibration set except its name."""
    digest = hashlib.sha256()
    for field in fields(calibration):
        if field.name != "name":
            _add(digest, getattr(calibration, field.name))
    sizes = {"sequences": len(calibration.sequences), "samples": len(calibration.samples), "tokens": calibration.tokens}
    return {**sizes, "sha256": digest.hexdigest()}


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(bytes_of(value.cpu().contiguous()))
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(repr(name).encode())
            _add(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(repr((type(value).__name__, len(value))).encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
