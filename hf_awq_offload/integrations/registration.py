"""Makes transformers know the package: what importing it leads to (stand_ins.py)."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.import_utils import is_compressed_tensors_available, is_gptqmodel_available

from ..config import QUANT_METHOD, AwqOffloadConfig
from ..errors import CheckpointError
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from .quantizer import AwqOffloadQuantizer

COMPRESSED_TENSORS = "compressed-tensors"


@cache
def register() -> None:
    """Add the recipe's quantizer, and load checkpoints where transformers' own loaders can't; does so once."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = AwqOffloadConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = AwqOffloadQuantizer
    if not is_gptqmodel_available():
        use_for_awq()
    if is_compressed_tensors_available():
        AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = cast(Any, compressed_tensors_quantizer)
    else:
        use_for_compressed_tensors()


def compressed_tensors_quantizer(config: Any, **kwargs: Any) -> HfQuantizer:
    """This package's for packed weights with zero points, transformers' own for all other checkpoints.

    compressed-tensors 0.18 to 0.20 makes room for zero points that are not packed, so that loading packed ones fails.
    """
    try:
        is_ours = not config.dequantize and PackedCheckpointConfig.from_dict(config.to_dict()).is_asymmetric
    except CheckpointError:
        is_ours = False
    return (AwqOffloadQuantizer if is_ours else CompressedTensorsHfQuantizer)(config, **kwargs)


def use_for_awq() -> None:
    """From now on load every checkpoint of `quant_method: "awq"` with this package, also where gptqmodel is there."""
    AUTO_QUANTIZER_MAPPING["awq"] = AwqOffloadQuantizer


def use_for_compressed_tensors() -> None:
    """From now on load every compressed-tensors checkpoint with this package, also where that library is there.

    Weights then stay packed in memory, and adapters can be trained on them. Only packed weights load
    ("pack-quantized", 2 to 8 bits); other checkpoints of that library raise a CheckpointError.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = PackedCheckpointConfig
    AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = AwqOffloadQuantizer
