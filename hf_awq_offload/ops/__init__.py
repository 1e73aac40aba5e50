"""Multiplies by packed weights: custom ops (schema.py) and the backends that they dispatch to (dispatch.py)."""

from .backend import Backend, LinearShape, NativeBackend, NativeWeight
from .dispatch import BACKENDS, ENVIRONMENT_VARIABLE, choose
from .schema import check_packed, dequantize, dequantize_native, linear, linear_native, native_backend, without_autocast

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "LinearShape",
    "NativeBackend",
    "NativeWeight",
    "check_packed",
    "choose",
    "dequantize",
    "dequantize_native",
    "linear",
    "linear_native",
    "native_backend",
    "without_autocast",
]
