"""Every field of the recipe: its name, type, default and help text, each written once.

`AwqOffloadConfig` inherits the fields and the command line makes options of them. This module must not import torch:
the command line reads it before it answers `--help`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, TypeVar

from .errors import ConfigError

T = TypeVar("T")


def refuse_unknown_fields(config_class: type[T]) -> type[T]:
    """Makes a dataclass's constructor raise a ConfigError for an unknown field; it names the nearest known one."""
    construct: Callable[..., None] = config_class.__init__
    known = [known_field.name for known_field in fields(config_class)]  # type: ignore[arg-type]  # T is a dataclass

    @wraps(construct)  # inspect.signature shows the fields
    def __init__(self: T, **given: Any) -> None:
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"{type(self).__name__} has no field {name!r}; did you mean {nearest!r}? Known: {', '.join(known)}."
                )
        construct(self, **given)

    config_class.__init__ = __init__  # type: ignore[method-assign, assignment]
    return config_class


@refuse_unknown_fields
@dataclass(kw_only=True, eq=False, repr=False)
class RecipeFields:
    """The fields; `metadata["help"]` says what each one means."""

    bits: int = field(
        default=4,
        metadata={"help": "bits per weight: 2, 3, 4 or 8; all but 4 are saved in the compressed-tensors format."},
    )
    group_size: int = field(
        default=128,
        metadata={"help": "input channels that share a scale and a zero point: 32, 64, 128, or -1 for the whole row."},
    )
    zero_point: bool | None = field(
        default=None,
        metadata={
            "help": "asymmetric grid, with a zero point per group; by default for linears below 8 bits. vLLM's Marlin "
            "kernels for AWQ need zero points; transformers without this package can't load them in the "
            "compressed-tensors format."
        },
    )
    overrides: dict[str, dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "other grids for some linears: maps a regular expression, searched in a linear's full name, to the "
            "fields that differ there (`bits`, `group_size`, `zero_point`); the last match wins."
        },
    )
    format: str = field(
        default="auto",
        metadata={
            "help": 'checkpoint format: "awq" (AWQ GEMM: 4 bits, one grid for all linears), "compressed-tensors" '
            '(pack-quantized), or "auto": AWQ if it can hold the model, else compressed-tensors.'
        },
    )
    dataset: Any = field(
        default="builtin",
        metadata={
            "help": 'calibration data. "builtin" is English text that ships with Python; see '
            "docs/calibration.md for the other forms (texts, token ids, tensors, `datasets.Dataset`, files, dataset "
            "names, and what a processor returns for texts with images)."
        },
    )
    tokenizer: Any = field(
        default=None,
        metadata={"help": "tokenizer or processor, by name or path; by default the checkpoint's own."},
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": 'column of `dataset` that holds the text; by default "text" or the only column of strings.'},
    )
    n_samples: int = field(default=128, metadata={"help": "number of calibration sequences."})
    max_seq_len: int = field(default=512, metadata={"help": "length of a calibration sequence, in tokens."})
    batch_tokens: int | None = field(
        default=None,
        metadata={"help": "tokens per micro-batch on the execution device; by default chosen to fit its memory."},
    )
    n_grid: int = field(
        default=20,
        metadata={"help": "number of candidates for the exponent in the scale search; 0 switches the search off."},
    )
    duo_scaling: bool = field(
        default=True,
        metadata={"help": "let the scale candidates depend on the weights, too (AWQ's `duo_scaling`)."},
    )
    clip: bool = field(default=True, metadata={"help": "search for a clipping range per group."})
    min_expert_tokens: int = field(
        default=256,
        metadata={
            "help": "calibration tokens that each expert of a mixture of experts needs; an expert "
            "that sees fewer is starved, and the layer's pooled statistics make up the difference."
        },
    )
    all_experts: bool = field(
        default=False,
        metadata={"help": "send every calibration token through every expert: slower, but no expert is starved."},
    )
    rounding: str = field(
        default="error_feedback",
        metadata={
            "help": '"nearest", or "error_feedback" (GPTQ\'s update on the same statistics, within the same format).'
        },
    )
    propagate: str = field(
        default="original",
        metadata={
            "help": 'which outputs calibrate the next decoder layer: those of the "original" layers or those of the '
            '"quantized" ones. "quantized" takes a second forward pass of every layer and gained nothing where we '
            "measured it (docs/log.md)."
        },
    )
    modules_to_not_convert: list[str] | None = field(
        default=None,
        metadata={
            "help": "linears that stay in full precision: names, prefixes, suffixes or regular expressions, matched "
            "as in transformers."
        },
    )
    mtp: str = field(
        default="keep",
        metadata={
            "help": "layers for multi-token prediction (speculative decoding), which transformers does not load: "
            '"keep" them in full precision, "quantize" their decoder layer, or "drop" them.'
        },
    )
    from_quantized: bool = field(
        default=False,
        metadata={
            "help": "accept a source that is already quantized to fewer than 8 bits (AWQ, GPTQ, bitsandbytes, …); it "
            "is refused by default, because both losses add up."
        },
    )
    execution_device: Any = field(
        default=None,
        metadata={"help": "device that processes each decoder layer; by default the accelerator, else the CPU."},
    )
    offload: str = field(
        default="auto",
        metadata={
            "help": 'where the full-precision weights wait for their turn: "cpu" (RAM), "disk" (read from the '
            'checkpoint\'s own safetensors files, layer by layer), or "auto": the disk if RAM is too small for them.'
        },
    )
    prefetch: bool = field(
        default=True,
        metadata={
            "help": "read the next decoder layer while the current one is processed; this takes the memory of a second "
            "layer."
        },
    )
    max_memory: Mapping[str, int | str] | None = field(
        default=None,
        metadata={
            "help": 'memory limits that the run does not exceed: maps a device ("cpu", "cuda:0") to bytes, or to a '
            'text such as "8GiB".'
        },
    )
    checkpoint_dir: str | os.PathLike[str] | None = field(
        default=None,
        metadata={"help": "folder for a journal of finished layers; after a crash, the same call resumes from it."},
    )
    report_dir: str | os.PathLike[str] | None = field(
        default=None,
        metadata={"help": "folder for the report of the run: report.json, report.html and pictures."},
    )
    seed: int = field(default=0, metadata={"help": "seed of everything random: the choice of samples, the probes."})
    backend: str = field(
        default="auto",
        metadata={
            "help": 'backend that computes the quantized linears of the returned model: "auto", or one of the backends '
            "in docs/kernels.md. The checkpoint does not store it. The environment variable HF_AWQ_OFFLOAD_BACKEND "
            "overrides it, and applies to loaded checkpoints, too."
        },
    )

    def __post_init__(self) -> None:
        """Called when all fields have their values; a subclass checks them here."""


def with_fields_described(
    docstring: str | None,  # None under python -OO
) -> str:
    """Returns `docstring` with a section "Args:", the help text of every field, before its section "Raises:"."""
    wrapper = textwrap.TextWrapper(116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    entries = [wrapper.fill(f"{entry.name}: {entry.metadata['help']}") for entry in fields(RecipeFields)]
    text, raises, errors = inspect.cleandoc(docstring or "").partition("Raises:")
    return "\n".join([text + "Args:", *entries, "", raises + errors])
