"""Provides loggers that follow transformers' verbosity settings."""

from typing import Any

from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> Any:
    """Returns a child of transformers' logger, so that `transformers.logging.set_verbosity_info()` applies to it."""
    return transformers_logging.get_logger(f"transformers.{name}")
