"""Looks at the config.json of a source before transformers parses it and builds the model that it describes.

transformers trusts this file. Its config classes make lists of as many entries as there are layers, its models as many
modules, and a value of another type fails somewhere in either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig

from ..checkpoint.opened import CONFIG_NAME, read_json
from ..errors import AwqOffloadError, CheckpointError

LEAST_LIMIT = 10_000
"""Layers that are believed of any checkpoint, and modules beside those that its tensors account for."""
MODULES_PER_TENSOR = 50
LAYER_COUNT = re.compile(r"(num|n)_(\w+_)?layers?|(\w+_)?layers")
"""Matches names of fields that count layers; not vocab_size_per_layer_input."""
BY_ACCIDENT = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RecursionError)
"""What transformers raises where it does not expect a value; what it says on purpose is a ValueError or an OSError."""

UNKNOWN_TYPE = re.compile(r"has model type `(.+?)` but Transformers does not recognize")
"""Matches what the Auto classes say of a type that they don't know."""
NEEDS_CODE = "pass the argument `trust_remote_code=True`"
"""What they say of a type that needs the checkpoint's own code."""


def require_readable_config(folder: Path, tensors: int, with_auto_class: bool = True) -> None:
    """Has transformers parse config.json, without any code of the checkpoint; types that it does not know pass.

    Args:
        folder: of the checkpoint.
        tensors: how many its files hold.
        with_auto_class: whether an Auto class is to load the model. Any other has a config class of its own, which may
            take what transformers' does not.

    Raises:
        CheckpointError: config.json says nonsense, or describes more layers than the files can hold.
    """
    _require_few_layers(read_json(folder / CONFIG_NAME), max(LEAST_LIMIT, tensors))
    if not with_auto_class:
        return
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and (UNKNOWN_TYPE.search(str(error)) or NEEDS_CODE in str(error)):
            return  # the class that loads the model may know its own type
        raise CheckpointError(
            f"transformers can't read {folder / CONFIG_NAME} ({type(error).__name__}: {str(error)[:1000]}). Correct "
            "it, or download the checkpoint again."
        ) from error


def _require_few_layers(config: dict[str, Any], most: int) -> None:
    level: list[Any] = [config]
    while level:
        for part in level:
            for name, value in part.items() if isinstance(part, dict) else ():
                if LAYER_COUNT.fullmatch(str(name)) and type(value) is int and value > most:
                    raise CheckpointError(
                        f"config.json says {name} = {str(value)[:30]}, and the checkpoint can't hold so many layers. "
                        "Correct config.json, or download the checkpoint again."
                    )
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]


@contextmanager
def building(tensors: int, is_built: Callable[[], bool]) -> Iterator[None]:
    """Bounds the model that transformers builds inside the context, and explains what a nonsensical config leads to.

    Args:
        tensors: how many the checkpoint holds.
        is_built: whether the model stands; what happens afterwards is neither bounded nor explained.

    Raises:
        CheckpointError: the model gets far more modules than the checkpoint has `tensors`, or can't be built.
    """
    most = LEAST_LIMIT + MODULES_PER_TENSOR * tensors
    modules = 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > most and not is_built():
            raise CheckpointError(
                f"config.json describes a model of more than {most} modules, and the checkpoint holds {tensors} "
                "tensors. Correct config.json, or download the checkpoint again."
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    except AwqOffloadError:
        raise
    except BY_ACCIDENT as error:
        if is_built() or "unexpected keyword argument" in str(error):  # the caller's own
            raise
        raise CheckpointError(
            f"transformers can't build the model that config.json describes ({type(error).__name__}: "
            f"{str(error)[:1000]}). Correct config.json, or download the checkpoint again."
        ) from error
    finally:
        handle.remove()
