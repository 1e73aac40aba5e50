"""The recipe: what to do with a model. It holds data sets and devices, and never leaves the machine.

recipe_fields.py lists the fields and config_checks.py checks their values. What a checkpoint's config.json says is kept
apart from the recipe on purpose, in formats/awq_config.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config_checks import (
    check_dataset,
    check_flag,
    check_folder,
    check_integer,
    check_is_one_of,
    check_text_column,
    check_tokenizer,
    checked_device,
    checked_memory_limits,
    checked_module_names,
)
from .errors import ConfigError
from .formats.grid import SCALE_DTYPE, Grid, resolve_group_size
from .formats.grid_choice import GridChoice, GridFields, check_choice, checked_overrides, choice_for, choices
from .ops import BACKENDS
from .recipe_fields import RecipeFields, with_fields_described

QUANT_METHOD = "awq_offload"
"""The name under which the recipe is registered with transformers."""

CHOICES = {
    "format": ("auto", "awq", "compressed-tensors"),
    "rounding": ("nearest", "error_feedback"),
    "propagate": ("original", "quantized"),
    "mtp": ("keep", "quantize", "drop"),
    "offload": ("auto", "cpu", "disk"),
    "backend": BACKENDS,
}

MIN_SEQ_LEN_TOKENS = 8


class AwqOffloadConfig(RecipeFields, QuantizationConfigMixin):
    """The recipe: how `from_pretrained` calibrates and quantizes a model. All fields are keyword-only.

    Raises:
        ConfigError: a value is not allowed, or a field is unknown.
    """

    quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers takes any registered string

    def __post_init__(self) -> None:
        self._validate()

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Like the base class, but check `quant_method`, which a serialized config carries, and drop it first."""
        if not isinstance(config_dict, Mapping) or not all(isinstance(name, str) for name in config_dict):
            raise ConfigError(f"The recipe is a {type(config_dict).__name__}; expected a dict of fields and values.")
        config_dict = dict(config_dict)
        method = config_dict.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method is {method!r}, AwqOffloadConfig expects {QUANT_METHOD!r}.")
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config._validate()
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs):
        """Like the base class, but check the new values, too."""
        unused = super().update(**kwargs)
        self._validate()
        return unused

    def __iter__(self):
        yield from self.to_dict().items()

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values; of a data set or tokenizer that is an object, only the type's name."""
        values = {"quant_method": self.quant_method, **self.__dict__}
        for name in ("dataset", "tokenizer", "execution_device", "checkpoint_dir", "report_dir"):
            if not isinstance(values[name], str | None):
                is_plain = name == "execution_device" or isinstance(values[name], os.PathLike)
                values[name] = str(values[name]) if is_plain else f"<{type(values[name]).__name__}>"
        return copy.deepcopy(values)

    def __deepcopy__(self, memo):
        # from_pretrained deep-copies the model's config. The data set is shared, not copied: it may be a
        # generator (which can't be copied) or larger than the model.
        copied = copy.copy(self)
        copied.modules_to_not_convert = copy.copy(self.modules_to_not_convert)
        copied.overrides = copy.deepcopy(self.overrides, memo)
        return copied

    def _validate(self) -> None:
        check_choice("", self._grid_fields)
        self.overrides = checked_overrides(self.overrides, self._grid_fields) or None
        for name, allowed in CHOICES.items():
            check_is_one_of(name, getattr(self, name), allowed)
        self._check_that_format_holds_grids()
        for field in fields(RecipeFields):
            if field.type == "bool":  # annotations are strings
                check_flag(field.name, getattr(self, field.name))
        self._check_integers()
        check_dataset(self.dataset)
        check_text_column(self.text_column)
        check_tokenizer(self.tokenizer)
        check_folder("checkpoint_dir", self.checkpoint_dir)
        check_folder("report_dir", self.report_dir)
        self.modules_to_not_convert = checked_module_names(self.modules_to_not_convert)
        self.execution_device = checked_device(self.execution_device)
        self.max_memory = checked_memory_limits(self.max_memory)

    def _check_that_format_holds_grids(self) -> None:
        if self.format == "awq" and not self._fits_awq:
            bits = sorted({choice.bits for choice in choices(self._grid_fields, self.overrides or {})})
            raise ConfigError(
                f"format is 'awq', but the recipe asks for {' and '.join(map(str, bits))} bits"
                f"{' and for different grids' if self.overrides else ''}; AWQ checkpoints hold 4 bits, the same "
                "for all linears. Pass format='compressed-tensors' or 'auto', or bits=4 without overrides."
            )

    def _check_integers(self) -> None:
        check_integer("n_samples", self.n_samples, 1, "a positive number of sequences, such as 128")
        at_least = f"a number of tokens, at least {MIN_SEQ_LEN_TOKENS}, such as 512"
        check_integer("max_seq_len", self.max_seq_len, MIN_SEQ_LEN_TOKENS, at_least)
        if self.batch_tokens is not None:
            check_integer("batch_tokens", self.batch_tokens, 1, "a positive number of tokens, or None")
        check_integer("n_grid", self.n_grid, 0, "a number of candidates such as 20, or 0 for no scale search")
        check_integer("min_expert_tokens", self.min_expert_tokens, 0, "a number of tokens such as 256, or 0")
        check_integer("seed", self.seed, 0, "an integer from 0 to 2**63 - 1", maximum=2**63 - 1)

    @property
    def base_choice(self) -> GridChoice:
        """The grid of linears that no override names."""
        return self._grid_fields.choice

    @property
    def _grid_fields(self) -> GridFields:
        return GridFields(self.bits, self.group_size, self.zero_point)

    @property
    def _fits_awq(self) -> bool:
        grids = choices(self._grid_fields, self.overrides or {})
        return len(grids) == 1 and self.bits == 4

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
        """The grid that the recipe gives to one linear."""
        return choice_for(name, self._grid_fields, self.overrides or {})

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
        """The limit that `max_memory` sets for a device, if any; "cuda" and "cuda:0" name the same one."""
        indexed = device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"
        for name, limit in (self.max_memory or {}).items():
            limited = torch.device(name)
            if indexed in (name, f"{limited.type}:{limited.index or 0}"):
                return int(limit)
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether any step reads activations. If none does, the data set is not loaded."""
        return self.n_grid > 0 or self.clip or self.rounding == "error_feedback"


def require_recipe(config: Any, field: str = "config") -> AwqOffloadConfig:
    """Returns `config`, which has to be a recipe.

    Raises:
        ConfigError: it is none; the configs of other methods describe what is quantized already.
    """
    if isinstance(config, AwqOffloadConfig):
        return config
    known = isinstance(config, QuantizationConfigMixin) and str(config.quant_method) != QUANT_METHOD
    why = ", which only describes a checkpoint that is quantized already" if known else ""
    raise ConfigError(f"{field} is a {type(config).__name__}{why}; pass an AwqOffloadConfig to quantize a model.")


AwqOffloadConfig.__doc__ = with_fields_described(AwqOffloadConfig.__doc__)
