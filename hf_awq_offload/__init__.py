"""AWQ as a quantizer of Hugging Face transformers: makes AWQ checkpoints, and loads them.

Importing the package registers it; `from_pretrained(..., quantization_config=AwqOffloadConfig(...))` then works.
"""

from .config import AwqOffloadConfig
from .errors import (
    AwqOffloadError,
    CalibrationDataError,
    CheckpointError,
    ConfigError,
    ModelStructureError,
    NumericalError,
    QuantizedWeightError,
)
from .in_memory import quantize_model
from .linear import AwqLinear
from .packed_linear import PackedLinear
from .quantizer import AwqOffloadQuantizer
from .registration import register, use_for_awq, use_for_compressed_tensors

__all__ = [
    "AwqLinear",
    "AwqOffloadConfig",
    "AwqOffloadError",
    "AwqOffloadQuantizer",
    "CalibrationDataError",
    "CheckpointError",
    "ConfigError",
    "ModelStructureError",
    "NumericalError",
    "PackedLinear",
    "QuantizedWeightError",
    "quantize_model",
    "use_for_awq",
    "use_for_compressed_tensors",
]

register()
