"""Sets how much is logged to stderr."""

from __future__ import annotations

import logging as python_logging
import warnings

import datasets
import huggingface_hub.utils
from transformers.utils import logging


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Sets the verbosity of this package, transformers, datasets and huggingface_hub."""
    if quiet:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        python_logging.getLogger("accelerate").setLevel(python_logging.ERROR)
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    elif verbose:
        logging.set_verbosity_info()
