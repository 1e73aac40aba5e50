"""What config.json says of an AWQ checkpoint: the interchange standard that other tools read."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..errors import CheckpointError
from .awq_variants import VERSIONS
from .grid_choice import GridChoice


@dataclass(kw_only=True)
class AwqCheckpointConfig(QuantizationConfigMixin):
    """What config.json says of a quantized checkpoint: the interchange standard, and nothing of the recipe.

    `meta` is where the standard leaves room for the tool that made the checkpoint.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    quant_method: QuantizationMethod = QuantizationMethod.AWQ

    SUPPORTED_VERSIONS = VERSIONS

    @classmethod
    def from_awq_config(cls, config: Any) -> AwqCheckpointConfig:
        """From transformers' own `AwqConfig`, which is what it parses an AWQ checkpoint's config.json to.

        Raises:
            CheckpointError: the checkpoint is of a kind that this package can't load.
        """
        version = str(getattr(config.format, "value", config.format))
        if version not in cls.SUPPORTED_VERSIONS:
            raise CheckpointError(
                f"The checkpoint's AWQ version is {version!r}; supported: {', '.join(cls.SUPPORTED_VERSIONS)}. "
                "Load it with the tool that made it, or correct config.json."
            )
        if config.bits != 4:
            raise CheckpointError(f"The checkpoint says bits={config.bits}; the AWQ format stores 4.")
        group_size = config.group_size
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size == 0 or group_size < -1:
            raise CheckpointError(
                f"The checkpoint says group_size={group_size!r}; expected a positive number of input channels or -1."
            )
        return cls(
            bits=config.bits,
            group_size=group_size,
            zero_point=bool(config.zero_point),
            version=version,
            modules_to_not_convert=config.modules_to_not_convert,
            meta=config.meta or {},
        )

    @property
    def choice(self) -> GridChoice:
        """The one grid of all quantized linears."""
        return GridChoice(self.bits, self.group_size, self.zero_point)

    def leave_out(self, names: list[str]) -> None:
        """Linears that are dense by now are no longer said to be quantized."""
        if names:
            self.modules_to_not_convert = [*(self.modules_to_not_convert or []), *names]

    def to_dict(self) -> dict[str, Any]:
        """The fields of the standard; `desc_act` and `lm_head` are there because vLLM and TGI read them."""
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
