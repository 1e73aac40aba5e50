"""Loads models and tokenizers as a command's options say."""

from __future__ import annotations

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from ..integrations.origin import TOKENIZER_MARKERS, Origin
from .checkpoint_folder import hub_arguments, named
from .outcome import CommandError


def load_tokenizer(source: str, options: argparse.Namespace, revision: str | None = None, is_base: bool = False) -> Any:
    """Loads a tokenizer by name or path; the command's model's own comes from the model's revision.

    Args:
        source: name or folder.
        options: --revision, --subfolder and --variant are for the command's model alone.
        revision: that of `source`, if it is another model.
        is_base: `source` is what the command's model is compared with, even if it has the same name.

    Raises:
        CommandError: there is none, or it can't be loaded.
    """
    try:
        with named(source):
            arguments = from_hub(options, source, is_base) | ({"revision": revision} if revision else {})
            return Origin(source, arguments).load(AutoTokenizer, TOKENIZER_MARKERS)
    except (ValueError, OSError) as error:
        raise CommandError(f"{source} has no tokenizer that loads: {error} Name one with --tokenizer.") from error


def model_class_of(options: argparse.Namespace) -> Any:
    """Returns the Auto class that loads the command's models."""
    return AutoModelForImageTextToText if options.image_text else AutoModelForCausalLM


def load(
    source: str, options: argparse.Namespace, revision: str | None = None, is_base: bool = False
) -> PreTrainedModel:
    """Loads a model as the options say, in evaluation mode.

    Args:
        source: name or folder.
        options: --revision, --subfolder and --variant are for the command's model alone.
        revision: that of `source`, if it is another model.
        is_base: `source` is what the command's model is compared with, even if it has the same name.

    Raises:
        CommandError: `source` could not be downloaded.
    """
    device_map = None if options.device_map == "none" else options.device_map
    arguments = from_hub(options, source, is_base) | ({"revision": revision} if revision else {})
    with named(source):
        model = model_class_of(options).from_pretrained(source, dtype=options.dtype, device_map=device_map, **arguments)
    return model.eval()


def from_hub(options: argparse.Namespace, source: str | None = None, is_base: bool = False) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that say where files come from, and whether code may run.

    `source` is what is loaded, by default the command's model; as the base, it may have the model's name.
    """
    arguments = hub_arguments(options) | ({"variant": options.variant} if options.variant else {})
    if is_base or (source is not None and source != options.model):
        arguments = {name: arguments[name] for name in arguments if name not in ("revision", "subfolder", "variant")}
    return arguments | {"trust_remote_code": options.trust_remote_code}  # False, not None: None asks
