"""Every error that the package raises on purpose.

    AwqOffloadError
    ├── ConfigError          (ValueError)    a field of AwqOffloadConfig, or a combination of fields
    ├── CalibrationDataError (ValueError)    the calibration data can't be read, or there is too little of it
    ├── ModelStructureError  (ValueError)    the model has nothing to quantize, or can't be traced
    ├── NumericalError       (RuntimeError)  activations or weights of a layer are not finite
    ├── CheckpointError      (ValueError)    a quantized checkpoint contradicts its own config
    ├── QuantizedWeightError (RuntimeError)  a quantized weight would be written to, trained or captured too early
    ├── MemoryLimitError     (ValueError)    the model can't be quantized within the available memory or disk space
    ├── JournalError         (ValueError)    checkpoint_dir belongs to another run, or is in use
    └── StorageError         (OSError)       a file can't be written: the disk is full, or the folder read-only

Every message says what was found, what was expected and what to do.
"""


class AwqOffloadError(Exception):
    """Base class: `except AwqOffloadError` catches every error that the package raises on purpose."""


class ConfigError(AwqOffloadError, ValueError):
    """A field of the quantization config is unknown, has an invalid value, or contradicts another field."""


class CalibrationDataError(AwqOffloadError, ValueError):
    """The calibration data can't be read, has the wrong form, or there is too little of it."""


class ModelStructureError(AwqOffloadError, ValueError):
    """The model has no decoder layers with linears to quantize, or its forward pass can't be traced."""


class NumericalError(AwqOffloadError, RuntimeError):
    """Activations or weights of a layer hold NaN or infinities."""


class CheckpointError(AwqOffloadError, ValueError):
    """The tensors of a quantized checkpoint contradict its config, or are of a kind that can't be loaded."""


class QuantizedWeightError(AwqOffloadError, RuntimeError):
    """Something would write to or train a quantized weight, or captures it in a CUDA graph before it is ready."""


class MemoryLimitError(AwqOffloadError, ValueError):
    """The model can't be quantized within the memory or disk space that is free, or that `max_memory` allows."""


class JournalError(AwqOffloadError, ValueError):
    """The journal in `checkpoint_dir` belongs to another run, is in use, or can't be read."""


class StorageError(AwqOffloadError, OSError):
    """A file can't be written: the disk is full, or the folder is read-only. Existing files are intact."""
