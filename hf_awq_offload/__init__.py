"""AWQ as a quantizer of Hugging Face transformers: makes AWQ checkpoints, and loads them.

Importing the package registers it; `from_pretrained(..., quantization_config=AwqOffloadConfig(...))` then works.
"""

from .config import AwqOffloadConfig
from .errors import (
    AwqOffloadError,
    CalibrationDataError,
    CheckpointError,
    ConfigError,
    JournalError,
    MemoryLimitError,
    ModelStructureError,
    NumericalError,
    QuantizedWeightError,
    StorageError,
)
from .in_memory import quantize_model
from .linear import AwqLinear
from .packed_linear import PackedLinear
from .planning import Plan, plan
from .quantizer import AwqOffloadQuantizer
from .registration import register, use_for_awq, use_for_compressed_tensors
from .streamed import quantize

__all__ = [
    "AwqLinear",
    "AwqOffloadConfig",
    "AwqOffloadError",
    "AwqOffloadQuantizer",
    "CalibrationDataError",
    "CheckpointError",
    "ConfigError",
    "JournalError",
    "MemoryLimitError",
    "ModelStructureError",
    "NumericalError",
    "PackedLinear",
    "Plan",
    "QuantizedWeightError",
    "StorageError",
    "plan",
    "quantize",
    "quantize_model",
    "use_for_awq",
    "use_for_compressed_tensors",
]

register()
