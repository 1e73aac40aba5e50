"""What to do: the recipe. It holds data sets and devices and never leaves the machine.

What a checkpoint's config.json says is kept apart from it on purpose, in formats/awq_config.py.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError
from .formats.grid import SCALE_DTYPE, Grid, resolve_group_size
from .formats.grid_choice import GridChoice, check_choice, checked_overrides, choice_for, choices
from .ops import BACKENDS

QUANT_METHOD = "awq_offload"
"""The name under which the recipe is registered with transformers."""

FORMATS = ("auto", "awq", "compressed-tensors")

OFFLOADS = ("auto", "cpu", "disk")

ROUNDINGS = ("nearest", "error_feedback")

PROPAGATIONS = ("original", "quantized")

MIN_SEQ_LEN_TOKENS = 8


class AwqOffloadConfig(QuantizationConfigMixin):
    """The recipe: how `from_pretrained` calibrates and quantizes a model.

    Args:
        bits: bits per weight: 4, or 2, 3, 8 in the compressed-tensors format.
        group_size: input channels that share a scale and a zero point: 32, 64, 128, or -1 for a whole row.
        zero_point: asymmetric grid (a zero point per group). vLLM's Marlin kernels want True.
        overrides: regular expressions, searched in the full names of linears -> the fields `bits`, `group_size`,
            `zero_point` that are different there; where several are found, a later one wins.
        format: what the checkpoint is: "awq" (AWQ GEMM: 4 bits, the same for all linears), "compressed-tensors"
            (pack-quantized), or "auto": AWQ where it can hold the model, else compressed-tensors.
        dataset: calibration data. `"builtin"` is English text that every CPython carries; see docs/calibration.md
            for the other forms (texts, token ids, tensors, `datasets.Dataset`, files, dataset names, and what a
            processor returns for texts with images).
        tokenizer: a tokenizer or processor, or a name or path of one; by default the checkpoint's own.
        text_column: the column of `dataset` that holds the text; by default "text" or the only column of strings.
        n_samples: number of calibration sequences.
        max_seq_len: length of a calibration sequence, in tokens.
        batch_tokens: tokens in one micro-batch on the execution device; by default chosen from its memory.
        n_grid: number of candidates for the exponent of the scale search; 0 switches the search off.
        duo_scaling: let the candidates depend on the weights too (AWQ's `duo_scaling`).
        clip: search for a clipping range per group.
        min_expert_tokens: an expert of a mixture of experts that sees fewer calibration tokens is given the layer's
            pooled statistics for those that it lacks.
        all_experts: send every calibration token through every expert; slower, and no expert goes without.
        rounding: "nearest", or "error_feedback" (GPTQ's update on the same statistics, within the same format).
        propagate: whose outputs the next decoder layer is calibrated on, those of the "original" layers or of the
            "quantized" ones; the latter takes a second forward pass of every layer and gained nothing (docs/log.md).
        modules_to_not_convert: names (suffixes, prefixes or regular expressions, as transformers matches them)
            of linears that stay in full precision.
        execution_device: where a decoder layer is processed; by default the accelerator, else the CPU.
        offload: where the full-precision weights are meanwhile: "cpu" (RAM), "disk" (read from the checkpoint's own
            safetensors files, layer by layer), or "auto": the disk if RAM is too small for them.
        prefetch: read the next decoder layer while one is at work; it costs the memory of a second layer.
        max_memory: device ("cpu", "cuda:0") -> bytes or text such as "8GiB" that are not exceeded.
        checkpoint_dir: folder of a journal in which finished layers are kept; the same call goes on after a crash.
        report_dir: folder that what was done and how it went is written to (report.json, report.html, pictures).
        seed: seed of everything random (the choice of samples, probes).
        backend: what computes the quantized linears of the model that is returned: "auto", or one of those in
            docs/kernels.md. It is not stored in the checkpoint; the environment variable HF_AWQ_OFFLOAD_BACKEND
            goes before it, and chooses for loaded checkpoints too.

    Raises:
        ConfigError: a value is not allowed, or a field is unknown.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        zero_point: bool = True,
        overrides: dict[str, dict[str, Any]] | None = None,
        format: str = "auto",
        dataset: Any = "builtin",
        tokenizer: Any = None,
        text_column: str | None = None,
        n_samples: int = 128,
        max_seq_len: int = 512,
        batch_tokens: int | None = None,
        n_grid: int = 20,
        duo_scaling: bool = True,
        clip: bool = True,
        min_expert_tokens: int = 256,
        all_experts: bool = False,
        rounding: str = "error_feedback",
        propagate: str = "original",
        modules_to_not_convert: list[str] | None = None,
        execution_device: Any = None,
        offload: str = "auto",
        prefetch: bool = True,
        max_memory: Mapping[str, int | str] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        report_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        backend: str = "auto",
        **unknown: Any,
    ):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers takes any registered string
        self.bits = bits
        self.group_size = group_size
        self.zero_point = zero_point
        self.overrides = overrides
        self.format = format
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.n_samples = n_samples
        self.max_seq_len = max_seq_len
        self.batch_tokens = batch_tokens
        self.n_grid = n_grid
        self.duo_scaling = duo_scaling
        self.clip = clip
        self.min_expert_tokens = min_expert_tokens
        self.all_experts = all_experts
        self.rounding = rounding
        self.propagate = propagate
        self.modules_to_not_convert = modules_to_not_convert
        self.execution_device = execution_device
        self.offload = offload
        self.prefetch = prefetch
        self.max_memory = max_memory
        self.checkpoint_dir = checkpoint_dir
        self.report_dir = report_dir
        self.seed = seed
        self.backend = backend
        self._reject_unknown(unknown)
        self._validate()

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """As the base class; `quant_method`, which a serialized config carries, is checked and taken out first."""
        config_dict = dict(config_dict)
        method = config_dict.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method is {method!r}, AwqOffloadConfig expects {QUANT_METHOD!r}.")
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config._validate()
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs):
        """As the base class; the new values are validated."""
        unused = super().update(**kwargs)
        self._validate()
        return unused

    def __iter__(self):
        yield from self.to_dict().items()

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values; a data set or tokenizer given as an object is described, never spelled out."""
        fields = dict(self.__dict__)
        for name in ("dataset", "tokenizer", "execution_device", "checkpoint_dir", "report_dir"):
            if not isinstance(fields[name], str | None):
                is_plain = name == "execution_device" or isinstance(fields[name], os.PathLike)
                fields[name] = str(fields[name]) if is_plain else f"<{type(fields[name]).__name__}>"
        return copy.deepcopy(fields)

    def __deepcopy__(self, memo):
        # from_pretrained deep-copies the model's config. The data set is shared, not copied: it may be a
        # generator (which can't be copied) or larger than the model.
        copied = copy.copy(self)
        copied.modules_to_not_convert = copy.copy(self.modules_to_not_convert)
        copied.overrides = copy.deepcopy(self.overrides, memo)
        return copied

    def _reject_unknown(self, unknown: Mapping[str, Any]) -> None:
        known = [name for name in self.__dict__ if name != "quant_method"]
        for name in unknown:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"AwqOffloadConfig has no field {name!r}; the nearest is {nearest!r}. Known: {', '.join(known)}."
            )

    def _validate(self) -> None:
        check_choice("", self.base_choice)
        self.overrides = checked_overrides(self.overrides, self.base_choice) or None
        if self.format not in FORMATS:
            raise ConfigError(f"format is {self.format!r}; pass one of {', '.join(map(repr, FORMATS))}.")
        if self.format == "awq" and not self._fits_awq:
            found = sorted({choice.bits for choice in choices(self.base_choice, self.overrides or {})})
            raise ConfigError(
                f"format is 'awq', but the recipe asks for {' and '.join(map(str, found))} bits"
                f"{' and for different grids' if self.overrides else ''}; AWQ checkpoints hold 4 bits, the same "
                "for all linears. Pass format='compressed-tensors' or 'auto', or bits=4 without overrides."
            )
        for name in ("duo_scaling", "clip", "all_experts", "prefetch"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; pass True or False.")
        _require_int("n_samples", self.n_samples, "a positive number of sequences, such as 128", minimum=1)
        _require_int(
            "max_seq_len",
            self.max_seq_len,
            f"a number of tokens, at least {MIN_SEQ_LEN_TOKENS}, such as 512",
            minimum=MIN_SEQ_LEN_TOKENS,
        )
        if self.batch_tokens is not None:
            _require_int("batch_tokens", self.batch_tokens, "a positive number of tokens, or None", minimum=1)
        _require_int("n_grid", self.n_grid, "a number of candidates such as 20, or 0 for no scale search", minimum=0)
        _require_int("min_expert_tokens", self.min_expert_tokens, "a number of tokens such as 256, or 0", minimum=0)
        _require_int("seed", self.seed, "an integer from 0 to 2**63 - 1", minimum=0, maximum=2**63 - 1)
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}; pass one of {', '.join(map(repr, BACKENDS))}.")
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"rounding is {self.rounding!r}; pass one of {', '.join(map(repr, ROUNDINGS))}.")
        if self.propagate not in PROPAGATIONS:
            raise ConfigError(f"propagate is {self.propagate!r}; pass one of {', '.join(map(repr, PROPAGATIONS))}.")
        self._validate_data()
        if self.modules_to_not_convert is not None:
            names = self.modules_to_not_convert
            if not isinstance(names, list | tuple | set | frozenset):
                raise ConfigError(f"modules_to_not_convert is {names!r}; pass a list of module names.")
            self.modules_to_not_convert = list(names)
            if not all(isinstance(name, str) and name for name in self.modules_to_not_convert):
                raise ConfigError(
                    f"modules_to_not_convert is {self.modules_to_not_convert!r}; every entry must be a non-empty "
                    "string, such as 'lm_head'."
                )
        if self.execution_device is not None:
            self.execution_device = _available_device(self.execution_device)
        if self.offload not in OFFLOADS:
            raise ConfigError(f"offload is {self.offload!r}; pass one of {', '.join(map(repr, OFFLOADS))}.")
        for name in ("checkpoint_dir", "report_dir"):
            folder = getattr(self, name)
            if folder is not None and not isinstance(folder, str | os.PathLike):
                raise ConfigError(f"{name} is {folder!r}; pass the path of a folder, or None.")
            if folder is not None and not os.fspath(folder):
                raise ConfigError(f"{name} is an empty string; pass the path of a folder, or None.")
        if self.max_memory is not None:
            self.max_memory = _memory_limits(self.max_memory)

    def _validate_data(self) -> None:
        if self.text_column is not None and not (isinstance(self.text_column, str) and self.text_column):
            raise ConfigError(f"text_column is {self.text_column!r}; pass the name of a column, or None.")
        if self.dataset is None or isinstance(self.dataset, bool | int | float | complex | bytes):
            raise ConfigError(
                f"dataset is {self.dataset!r}; pass 'builtin', a list of texts, token ids, a datasets.Dataset, a "
                "path or a dataset name. To quantize without data, set n_grid=0, clip=False and rounding='nearest'."
            )
        if isinstance(self.dataset, str) and not self.dataset.strip():
            raise ConfigError("dataset is an empty string; pass 'builtin', a path or a dataset name.")
        if isinstance(self.tokenizer, str) and not self.tokenizer.strip():
            raise ConfigError("tokenizer is an empty string; pass a name or path, or None for the checkpoint's own.")
        if not (self.tokenizer is None or isinstance(self.tokenizer, str | os.PathLike) or callable(self.tokenizer)):
            raise ConfigError(
                f"tokenizer is a {type(self.tokenizer).__name__}; pass a tokenizer, its name or path, or None for the "
                "checkpoint's own."
            )

    @property
    def base_choice(self) -> GridChoice:
        """The grid of linears that no override names."""
        return GridChoice(self.bits, self.group_size, self.zero_point)

    @property
    def _fits_awq(self) -> bool:
        found = choices(self.base_choice, self.overrides or {})
        return len(found) == 1 and self.bits == 4

    @property
    def checkpoint_format(self) -> str:
        """ "awq" or "compressed-tensors"."""
        if self.format != "auto":
            return self.format
        return "awq" if self._fits_awq else "compressed-tensors"

    def choice(
        self,
        name: str,  # of a linear in the model
    ) -> GridChoice:
        """The grid of one linear as the recipe has it."""
        return choice_for(name, self.base_choice, self.overrides or {})

    def grid(
        self,
        name: str,  # of a linear in the model
        in_features: int,
        dtype: torch.dtype,  # of the linear's weight
    ) -> Grid:
        """The grid of one linear."""
        choice = self.choice(name)
        is_bf16_stored = self.checkpoint_format != "awq" and dtype == torch.bfloat16
        scale_dtype = torch.bfloat16 if is_bf16_stored else SCALE_DTYPE
        return Grid(choice.bits, resolve_group_size(choice.group_size, in_features), choice.zero_point, scale_dtype)

    def memory_limit_bytes(self, device: torch.device) -> int | None:
        """What `max_memory` says of a device; "cuda" and "cuda:0" are the same."""
        indexed = device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"
        for name, limit in (self.max_memory or {}).items():
            limited = torch.device(name)
            if indexed in (name, f"{limited.type}:{limited.index or 0}"):
                return int(limit)
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether any step reads activations; without one the data set is not loaded at all."""
        return self.n_grid > 0 or self.clip or self.rounding == "error_feedback"


def _require_int(
    name: str,
    value: Any,
    remedy: str,
    minimum: int | None = None,
    maximum: int | None = None,
) -> None:
    """Raise ConfigError unless `value` is an integer (not a bool) within the bounds."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    in_bounds = is_int and ((minimum is None or value >= minimum) and (maximum is None or value <= maximum))
    if not in_bounds:
        raise ConfigError(f"{name} is {value!r}; pass {remedy}.")


def _memory_limits(limits: Any) -> dict[str, int]:
    """Device as torch spells it -> bytes; ConfigError unless all are known."""
    if not isinstance(limits, Mapping):
        raise ConfigError(
            f"max_memory is {limits!r}; pass a dict such as {{'cuda:0': '8GiB', 'cpu': '32GiB'}}, or None."
        )
    found = {}
    for device, limit in limits.items():
        try:
            if isinstance(device, bool) or not isinstance(device, str | int):
                raise ValueError(f"a {type(device).__name__} for a device")
            name = str(torch.device(device))
            limit_bytes = convert_file_size_to_int(limit)
            if isinstance(limit, bool) or limit_bytes <= 0:
                raise ValueError("not a positive size")
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"max_memory is {limits!r}: {device!r} has {str(error).splitlines()[0]}; pass devices such as 'cpu' or "
                "'cuda:0' with a number of bytes, or a text such as '8GiB'."
            ) from error
        found[name] = int(limit_bytes)
    return found


def _available_device(device: Any) -> str:
    """`device` as torch spells it; ConfigError unless torch knows it and the machine has it."""
    try:
        if not isinstance(device, str | int | torch.device):
            raise TypeError(f"a {type(device).__name__}")
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
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
