"""Provides loggers that follow transformers' verbosity, and quiets what other libraries say while they work for us."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from huggingface_hub import utils as hub_utils
from transformers.utils import logging as transformers_logging

OWN_LOGGER = "transformers.hf_awq_offload"
"""The logger above all of this package's."""

OWN_UNITS = ("layer", "window")
"""The units that this package's own bars count, by which they are told from those of transformers."""


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


def can_redraw() -> bool:
    """Returns whether stderr is a terminal or a notebook's output, where a bar can be redrawn in place."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    shell = get_shell()
    is_notebook = shell is not None and "IPKernelApp" in shell.config
    return is_notebook or (sys.stderr.isatty() and _has_room())


def _has_room() -> bool:
    """Returns whether the terminal has a size; in some containers it has none, and tqdm draws nothing there."""
    try:
        return 0 not in os.get_terminal_size(sys.stderr.fileno())
    except OSError:  # the size is not known
        return True


@contextmanager
def with_own_bars_alone() -> Iterator[None]:
    """Shows, of all progress bars that transformers makes, this package's alone; a hook of the user's stays."""

    def make(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        is_own = options.get("unit") in OWN_UNITS
        return factory(*arguments, **(options if is_own else options | {"disable": True}))

    previous = transformers_logging.set_tqdm_hook(make)
    if previous is not None:
        transformers_logging.set_tqdm_hook(previous)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def without_bars_in_log_files() -> AbstractContextManager[None]:
    """Shows no bars of transformers where they can't be redrawn: each step would fill a file with carriage returns."""
    return nullcontext() if can_redraw() else with_own_bars_alone()
