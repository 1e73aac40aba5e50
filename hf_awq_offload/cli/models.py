"""Loads models and tokenizers as a command's options say."""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from .checkpoint_folder import named
from .outcome import CommandError


def load_tokenizer(source: str, options: argparse.Namespace) -> Any:
    """Loads a tokenizer by name or path.

    Raises:
        CommandError: there is none, or it can't be loaded.
    """
    try:
        with named(source):
            return AutoTokenizer.from_pretrained(source, **_from_hub(options))
    except (ValueError, OSError) as error:
        raise CommandError(f"{source} has no tokenizer that loads: {error} Name one with --tokenizer.") from error


def load(source: str, options: argparse.Namespace) -> PreTrainedModel:
    """Loads a model as the options say, in evaluation mode.

    Raises:
        CommandError: `source` could not be downloaded.
    """
    model_class: Any = AutoModelForImageTextToText if options.image_text else AutoModelForCausalLM
    device_map = None if options.device_map == "none" else options.device_map
    with named(source):
        model = model_class.from_pretrained(source, dtype=options.dtype, device_map=device_map, **_from_hub(options))
    return model.eval()


def _from_hub(options: argparse.Namespace) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": True} if options.trust_remote_code else {}
    return arguments | ({"revision": options.revision} if options.revision else {})
