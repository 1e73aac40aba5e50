"""The quantization config of an AWQ checkpoint, as other tools read it in config.json."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..errors import CheckpointError
from .grid_choice import GridChoice
from .layouts import AWQ_FORMATS
from .name_patterns import fault_in


@dataclass(kw_only=True)
class AwqCheckpointConfig(QuantizationConfigMixin):
    """The quantization config of an AWQ checkpoint: the standard's fields and nothing of the recipe.

    `meta` is the standard's place for what the tool that made the checkpoint wants to record.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    quant_method: QuantizationMethod = QuantizationMethod.AWQ

    @classmethod
    def from_awq_config(cls, config: Any) -> AwqCheckpointConfig:
        """Converts transformers' own `AwqConfig`, to which it parses the config.json of an AWQ checkpoint.

        Raises:
            CheckpointError: this package can't load such a checkpoint.
        """
        version = str(getattr(config.format, "value", config.format))
        if version not in AWQ_FORMATS:
            raise CheckpointError(
                f"The checkpoint's AWQ version is {version!r}; supported: {', '.join(AWQ_FORMATS)}. "
                "Load it with the tool that made it, or correct config.json."
            )
        if type(config.bits) is not int or config.bits != 4:
            raise CheckpointError(f"The checkpoint says bits={config.bits!r}; the AWQ format stores 4.")
        if not isinstance(config.zero_point, bool):
            raise CheckpointError(f"The checkpoint says zero_point={config.zero_point!r}; expected true or false.")
        group_size = config.group_size
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size == 0 or group_size < -1:
            raise CheckpointError(
                f"The checkpoint says group_size={group_size!r}; expected a positive number of input channels or -1."
            )
        meta = getattr(config, "meta", None) or {}
        if not isinstance(meta, dict):
            raise CheckpointError(f"The checkpoint's meta is a {type(meta).__name__}; expected a JSON object.")
        return cls(
            bits=config.bits,
            group_size=group_size,
            zero_point=config.zero_point,
            version=version,
            modules_to_not_convert=_checked_names(config.modules_to_not_convert),
            meta=meta,
        )

    @property
    def layout(self) -> str:
        """The checkpoint format (formats/layouts.py)."""
        return self.version

    @property
    def choice(self) -> GridChoice:
        """The one grid of all quantized linears."""
        return GridChoice(self.bits, self.group_size, self.zero_point)

    def leave_out(self, names: list[str]) -> None:
        """Adds entries for linears that are dense by now."""
        before = self.modules_to_not_convert or []
        added = [name for name in names if name not in before]
        self.modules_to_not_convert = [*before, *added] or None

    def to_dict(self) -> dict[str, Any]:
        """The standard's fields, with `desc_act` and `lm_head`, which vLLM and TGI read."""
        return {
            "quant_method": self.quant_method.value,
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": self.version,
            "modules_to_not_convert": copy.copy(self.modules_to_not_convert),
            "desc_act": False,
            "lm_head": False,
            "meta": copy.deepcopy(self.meta),
        }


def _checked_names(names: Any) -> list[str] | None:
    """`modules_to_not_convert` as a list of its own."""
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(
            f"The checkpoint's modules_to_not_convert is {names!r}; expected a list of names of modules. Correct "
            "config.json."
        )
    for name in names:
        fault = fault_in(name)
        if fault is not None:
            raise CheckpointError(
                f"The checkpoint's modules_to_not_convert has the entry {name[:200]!r}, which is not a valid regular "
                f"expression ({fault}). Correct config.json."
            )
    return list(names)
