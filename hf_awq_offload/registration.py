"""Makes transformers know the package. Registering is all that importing it does."""

from __future__ import annotations

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.utils.import_utils import is_gptqmodel_available

from .config import QUANT_METHOD, AwqOffloadConfig
from .quantizer import AwqOffloadQuantizer


def register() -> None:
    """Add the recipe's quantizer, and load AWQ checkpoints where transformers' own loader can't."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = AwqOffloadConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = AwqOffloadQuantizer
    if not is_gptqmodel_available():
        use_for_awq()


def use_for_awq() -> None:
    """From now on load every checkpoint of `quant_method: "awq"` with this package, also where gptqmodel is there."""
    AUTO_QUANTIZER_MAPPING["awq"] = AwqOffloadQuantizer
