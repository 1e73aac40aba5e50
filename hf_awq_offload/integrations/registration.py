"""Registers the package with transformers; runs when the imported package is first used (stand_ins.py)."""

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
from .load_call import remember_calls
from .origin import remember_origin
from .quantizer import AwqOffloadQuantizer
from .source_hooks import read_through_sources
from .source_look import explain_auto_class, look_at_folder

COMPRESSED_TENSORS = "compressed-tensors"


@cache
def register() -> None:
    """Registers the quantizer, also for checkpoints that transformers' own loaders can't load; only once."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = AwqOffloadConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = AwqOffloadQuantizer
    remember_calls(look_at_folder, explain_auto_class, remember_origin)
    read_through_sources()
    if not is_gptqmodel_available():
        use_for_awq()
    if is_compressed_tensors_available():
        AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = cast(Any, compressed_tensors_quantizer)
    else:
        use_for_compressed_tensors()


def compressed_tensors_quantizer(config: Any, **kwargs: Any) -> HfQuantizer:
    """Returns this package's quantizer for packed weights with zero points, transformers' own otherwise.

    compressed-tensors 0.18 to 0.20 allocates unpacked zero points, so it can't load packed ones.
    """
    try:
        is_ours = not config.dequantize and PackedCheckpointConfig.from_dict(config.to_dict()).is_asymmetric
    except CheckpointError:
        is_ours = False
    return (AwqOffloadQuantizer if is_ours else CompressedTensorsHfQuantizer)(config, **kwargs)


def use_for_awq() -> None:
    """Makes transformers load `quant_method: "awq"` checkpoints with this package, even if gptqmodel is installed."""
    AUTO_QUANTIZER_MAPPING["awq"] = AwqOffloadQuantizer


def use_for_compressed_tensors() -> None:
    """Makes transformers load compressed-tensors checkpoints with this package, even if that library is installed.

    Weights then stay packed in memory, and adapters can be trained on them. Only packed weights load
    ("pack-quantized", 2 to 8 bits); other compressed-tensors checkpoints raise a CheckpointError.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = PackedCheckpointConfig
    AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = AwqOffloadQuantizer
