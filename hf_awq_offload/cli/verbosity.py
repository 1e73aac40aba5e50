"""Sets how much a command says on stderr, and in whose words."""

from __future__ import annotations

import argparse
import logging as python_logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import datasets
import huggingface_hub.utils
from transformers.utils import logging

from ..logs import OWN_LOGGER, can_redraw, without_bars_in_log_files
from .recipe_options import with_options


@contextmanager
def spoken_as_asked(options: argparse.Namespace) -> Iterator[None]:
    """Sets how much is said inside the context; messages of `quantize` name options instead of the recipe's fields.

    --quiet silences all libraries for the rest of the process. --verbose lets this package say what it does;
    transformers would print whole configs.
    """
    own = python_logging.getLogger(OWN_LOGGER)
    with ExitStack() as stack:
        if options.quiet:
            _silence()
        elif options.verbose:
            stack.callback(own.setLevel, own.level)
            own.setLevel(python_logging.INFO)
        if not can_redraw():
            stack.enter_context(without_bars_in_log_files())
            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                stack.callback(datasets.enable_progress_bars)
        if options.command == "quantize":
            for handler in python_logging.getLogger("transformers").handlers:
                handler.addFilter(_name_options)
                stack.callback(handler.removeFilter, _name_options)
        yield


def _silence() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    python_logging.getLogger("accelerate").setLevel(python_logging.ERROR)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()


def _name_options(record: python_logging.LogRecord) -> bool:
    if record.name.startswith(OWN_LOGGER):
        record.msg, record.args = with_options(record.getMessage()), ()
    return True
