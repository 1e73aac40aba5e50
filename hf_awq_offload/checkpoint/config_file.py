"""Adds to a checkpoint's config.json the keys that readers built on transformers 4 look for."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..formats.older_keys import Reader, with_older_keys
from .durable import replacing


def add_older_keys(folder: Path, config_class: type[PreTrainedConfig] | None = None) -> None:
    """Rewrites `folder`'s config.json with the older keys beside the new ones, in one step; all other keys stay.

    Args:
        folder: a saved model.
        config_class: what parses its config.json; by default the class that transformers has for its model_type.

    Raises:
        OSError: the file can't be read or written; it is unchanged.
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = completed(config, config_class)
    if changed != config:
        with replacing(path) as partial:
            partial.write_text(text_of(changed), encoding="utf-8")


def completed(config: dict[str, Any], config_class: type[PreTrainedConfig] | None = None) -> dict[str, Any]:
    """Returns the content of a config.json with the older keys; see `add_older_keys`."""
    if config_class is None and config.get("model_type") in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[config["model_type"]]
    if config_class is None:
        return with_older_keys(config, None)
    with TemporaryDirectory() as folder:
        return with_older_keys(config, _reader(config_class, Path(folder)))


def text_of(config: dict[str, Any]) -> str:
    """Returns a config.json as transformers writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _reader(config_class: type[PreTrainedConfig], folder: Path) -> Reader:
    """Returns a function that parses a config.json as `from_pretrained` does, by way of a file in `folder`."""

    def read(config: dict[str, Any]) -> dict[str, Any]:
        config.pop("quantization_config", None)  # parsing it may need other packages, and says nothing here
        (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        with _silence():
            return config_class.from_pretrained(folder).to_dict()

    return read


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps what transformers says of the candidates from the user."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
