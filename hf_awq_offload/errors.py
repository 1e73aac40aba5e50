"""Every error that the package raises on purpose.

    AwqOffloadError
    ├── ConfigError          (ValueError)    a field of AwqOffloadConfig, or a combination of fields
    ├── CalibrationDataError (ValueError)    the calibration data can't be read, or is too little
    ├── ModelStructureError  (ValueError)    the model has nothing to quantize, or can't be traced
    ├── NumericalError       (RuntimeError)  activations or weights of a layer are not finite
    ├── CheckpointError      (ValueError)    a quantized checkpoint contradicts its own config
    ├── QuantizedWeightError (RuntimeError)  something would write to, or train, a weight that is stored in 4 bits
    ├── MemoryLimitError     (ValueError)    the model can't be quantized within the memory or disk that there is
    ├── JournalError         (ValueError)    checkpoint_dir belongs to another run, or is in use
    └── StorageError         (OSError)       a file can't be written: the disk is full, or the folder read-only

A message says what was found, what was expected and what to do.
"""


class AwqOffloadError(Exception):
    """Base class: `except AwqOffloadError` catches all that the package raises on purpose."""


class ConfigError(AwqOffloadError, ValueError):
    """A field of the quantization config is unknown, has a value that is not allowed, or contradicts another."""


class CalibrationDataError(AwqOffloadError, ValueError):
    """The calibration data can't be read, has the wrong form, or is too little."""


class ModelStructureError(AwqOffloadError, ValueError):
    """The model has no decoder layers with linears to quantize, or its forward pass can't be traced."""


class NumericalError(AwqOffloadError, RuntimeError):
    """Activations or weights of a layer hold NaN or infinities."""


class CheckpointError(AwqOffloadError, ValueError):
    """A quantized checkpoint's tensors contradict the config that came with them."""


class QuantizedWeightError(AwqOffloadError, RuntimeError):
    """Something would change or train a quantized weight in a way that it can't be: the change would be lost."""


class MemoryLimitError(AwqOffloadError, ValueError):
    """The model can't be quantized within the memory or disk that there is, or that `max_memory` allows."""


class JournalError(AwqOffloadError, ValueError):
    """The journal in `checkpoint_dir` belongs to another run, is in use, or can't be read."""


class StorageError(AwqOffloadError, OSError):
    """A file can't be written: the disk is full, or the folder is read-only. What was there before is whole."""
