"""Finds entries of `modules_to_not_convert` that name no module: a typo would quantize what was to be left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..checkpoint.renaming import Renaming
from ..errors import ConfigError
from ..formats.nearest_names import nearest_names


def is_named(
    name: str,  # of a linear in the model
    entries: Sequence[str],
    renaming: Renaming,
) -> bool:
    """Returns whether entries name a linear or a module around it, by its name in the model or in checkpoints.

    The rule is transformers', which is meant for linears: of the modules around one, it knows the start alone.
    """
    if not entries:
        return False
    return any(
        not should_convert_module(part, list(entries))
        for full_name in {name, renaming.name_in_checkpoint(name)}
        for part in accumulate(full_name.split("."), "{}.{}".format)
    )


def require_known_modules(
    entries: Sequence[str],
    model: nn.Module,
    renaming: Renaming,
    others: Iterable[str] = (),  # names of modules in the checkpoint, or that the model will have
) -> None:
    """Checks that each entry names a module of the model or of the checkpoint.

    Raises:
        ConfigError: one does not; the message has the nearest names.
    """
    unknown = list(entries)
    if not unknown:
        return
    names: dict[str, None] = {}
    for name in _names(model, renaming, others):
        names[name] = None
        unknown = [entry for entry in unknown if should_convert_module(name, [entry])]
        if not unknown:
            return
    entry = unknown[0]
    near = nearest_names(entry, names)
    raise ConfigError(
        f"modules_to_not_convert has the entry {entry!r}, which names no module of the model or the checkpoint; "
        f"did you mean {' or '.join(map(repr, near))}? Correct the entry: it is the start "
        "or the end of a full name, or a regular expression for its start."
    )


def _names(model: nn.Module, renaming: Renaming, others: Iterable[str]) -> Iterator[str]:
    """Yields names of modules, some of them twice."""
    for name, _ in model.named_modules():
        if name:
            yield name
            yield renaming.name_in_checkpoint(name)
    yield from others
