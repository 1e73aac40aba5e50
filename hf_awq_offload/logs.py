"""Provides loggers that follow transformers' verbosity, and quiets what other libraries say while they work for us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import utils as hub_utils
from transformers.utils import logging as transformers_logging


def get_logger(name: str) -> Any:
    """Returns a child of transformers' logger, so that `transformers.logging.set_verbosity_info()` applies to it."""
    return transformers_logging.get_logger(f"transformers.{name}")


@contextmanager
def without_message(logger_name: str, beginning: str) -> Iterator[None]:
    """Drops records of the logger `logger_name` whose text begins with `beginning`; all others are logged."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger = logging.getLogger(logger_name)
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def without_offload_message() -> Any:
    """Drops accelerate's line "Some parameters are on the meta device": where weights are is what users asked for."""
    return without_message("accelerate.big_modeling", "Some parameters are on the meta device")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Shows no progress bars of transformers; those of huggingface_hub stay as they are, and all come back."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    hub_is_quiet = hub_utils.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    _set_hub_bars(hub_is_quiet)
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        _set_hub_bars(hub_is_quiet)


def _set_hub_bars(are_quiet: bool) -> None:
    (hub_utils.disable_progress_bars if are_quiet else hub_utils.enable_progress_bars)()
