"""Loggers that transformers' verbosity settings govern."""

from typing import Any

from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> Any:
    """A logger below transformers' own: `transformers.logging.set_verbosity_info()` and its kin apply to it."""
    return transformers_logging.get_logger(f"transformers.{name}")
