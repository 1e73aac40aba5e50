"""Chooses the backend for a linear: the requested one, or the first in the device's order that does not refuse.

A backend is requested by the environment variable HF_AWQ_OFFLOAD_BACKEND, which takes precedence, or by
`AwqLinear.backend` (`AwqOffloadConfig(backend=...)`). If a requested backend cannot serve the linear, an error says
why; "auto" tries the next one instead.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

from ..errors import ConfigError
from .backend import Backend, LinearShape, WordsBackend

ENVIRONMENT_VARIABLE = "HF_AWQ_OFFLOAD_BACKEND"

BACKENDS = ("auto", "torch", "c", "cpu", "triton", "tinygemm", "xpu")
"""The valid values of the environment variable and of the config's field."""

ORDER = {"cpu": ("c", "cpu"), "cuda": ("triton", "tinygemm"), "xpu": ("xpu",)}
"""Device type -> backends in the order to try; "torch" serves the linears that all of them refuse.

On CUDA the order is not based on a measurement (docs/kernels.md). `tests/bench/linear.py --decoding` measures both on a
card; change the order here if it says so. It can depend on what `LinearShape` says, but not on the number of rows: a
backend with a layout of its own keeps nothing that another backend could read."""


def choose(
    requested: str,  # one of BACKENDS
    linear: LinearShape,
) -> Backend:
    """Returns the backend for `linear`.

    Raises:
        ConfigError: the requested backend is unknown, or refuses.
    """
    return _choose(os.environ.get(ENVIRONMENT_VARIABLE, ""), requested, linear)


def dequantizer(requested: str, linear: LinearShape) -> WordsBackend:
    """Returns the backend that dequantizes to `linear.dtype`: the one for `linear` if it reads AWQ words, else "torch".

    Never raises: a weight can be read in any dtype, even if the backend multiplies only in a few.
    """
    try:
        backend = choose(requested, linear)
    except ConfigError:
        backend = None
    if not isinstance(backend, WordsBackend):
        backend = backend_named("torch")
    assert isinstance(backend, WordsBackend)
    return backend


def backend_named(name: str) -> Backend:
    """Returns a backend; imports its module only now, so that unused backends may lack their dependencies."""
    return import_module(f".{name}_backend", __package__).BACKEND


@cache
def _choose(environment: str, requested: str, linear: LinearShape) -> Backend:
    name = environment or requested
    source = f"{ENVIRONMENT_VARIABLE}={environment}" if environment else f"backend={requested!r}"
    if name not in BACKENDS:
        raise ConfigError(f"{source} is not a backend; expected one of {', '.join(BACKENDS)}.")
    if name != "auto":
        backend = backend_named(name)
        reason = backend.refusal(linear)
        if reason is not None:
            raise ConfigError(
                f"{source} can't serve a linear of {linear.in_features} to {linear.out_features} channels: {reason}. "
                "Choose 'auto' or 'torch' instead."
            )
        return backend
    for candidate in ORDER.get(linear.device.type, ()):
        backend = backend_named(candidate)
        if backend.refusal(linear) is None:
            return backend
    return backend_named("torch")
