"""AWQ as a quantizer for Hugging Face transformers: makes AWQ checkpoints and loads them.

Importing the package registers it; `from_pretrained(..., quantization_config=AwqOffloadConfig(...))` then works. The
import is cheap: torch and transformers are imported when a public name is first used (integrations/stand_ins.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations.stand_ins import register_when_needed

if TYPE_CHECKING:
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
    from .evaluating import evaluate
    from .in_memory import quantize_model
    from .integrations.quantizer import AwqOffloadQuantizer
    from .integrations.registration import use_for_awq, use_for_compressed_tensors
    from .nn.awq_linear import AwqLinear
    from .nn.packed_linear import PackedLinear
    from .planning import plan
    from .report import Plan
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
    "evaluate",
    "plan",
    "quantize",
    "quantize_model",
    "use_for_awq",
    "use_for_compressed_tensors",
]

_HOME = {
    "AwqLinear": "nn.awq_linear",
    "AwqOffloadConfig": "config",
    "AwqOffloadQuantizer": "integrations.quantizer",
    "PackedLinear": "nn.packed_linear",
    "Plan": "report",
    "evaluate": "evaluating",
    "plan": "planning",
    "quantize": "streamed",
    "quantize_model": "in_memory",
    "use_for_awq": "integrations.registration",
    "use_for_compressed_tensors": "integrations.registration",
}
"""Maps public names to their modules; all others are in `errors`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME.get(name, "errors")
    if home != "errors":
        import_module(".integrations.registration", __name__).register()
    value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_needed()
