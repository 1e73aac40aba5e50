"""Which backend serves a linear: the one asked for, else the first in the device's order that does not refuse.

Asked for by the environment variable HF_AWQ_OFFLOAD_BACKEND, which goes first, or by `AwqLinear.backend`
(`AwqOffloadConfig(backend=...)`). Asking for one that can't serve is an error that says why; "auto" goes on to the
next.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

from ..errors import ConfigError
from .backend import Backend, LinearShape, WordsBackend

ENVIRONMENT_VARIABLE = "HF_AWQ_OFFLOAD_BACKEND"

BACKENDS = ("auto", "torch", "c", "cpu", "triton", "tinygemm", "xpu")
"""Values of the environment variable and of the config's field."""

ORDER = {"cpu": ("c", "cpu"), "cuda": ("triton", "tinygemm"), "xpu": ("xpu",)}
"""Device type -> backends to try; "torch" serves what they all refuse."""


def choose(
    requested: str,  # one of BACKENDS
    linear: LinearShape,
) -> Backend:
    """The backend for `linear`.

    Raises:
        ConfigError: the backend that was asked for is unknown, or refuses.
    """
    return _choose(os.environ.get(ENVIRONMENT_VARIABLE, ""), requested, linear)


def dequantizer(requested: str, linear: LinearShape) -> WordsBackend:
    """Who dequantizes to `linear.dtype`: the backend for `linear` if it reads the AWQ words, else torch's.

    None is refused: a backend that multiplies in few dtypes only is no reason not to read a weight.
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
    """The backend; its file is imported now, so that what it needs may be missing until then."""
    return import_module(f".{name}_backend", __package__).BACKEND


@cache
def _choose(environment: str, requested: str, linear: LinearShape) -> Backend:
    name = environment or requested
    source = f"{ENVIRONMENT_VARIABLE}={environment}" if environment else f"backend={requested!r}"
    if name not in BACKENDS:
        raise ConfigError(f"{source} is not a backend; known: {', '.join(BACKENDS)}.")
    if name != "auto":
        backend = backend_named(name)
        reason = backend.refusal(linear)
        if reason is not None:
            raise ConfigError(
                f"{source} can't serve a linear of {linear.in_features} to {linear.out_features} channels: {reason}. "
                "Choose 'auto' or 'torch'."
            )
        return backend
    for candidate in ORDER.get(linear.device_type, ()):
        backend = backend_named(candidate)
        if backend.refusal(linear) is None:
            return backend
    return backend_named("torch")
