"""Remembers the call of `from_pretrained` that a model is quantized in, so that its arguments reach everything.

transformers hands a quantizer the model and its files, but not where they come from: revision, token, cache_dir and
the like. `remember_calls` wraps the two methods that every load goes through, those of `PreTrainedModel` and of the
Auto classes. Calls without a recipe pass through unchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..config import AwqOffloadConfig

HUB_ARGUMENTS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("trust_remote_code", "code_revision"),
)
"""Arguments that say where a checkpoint's files come from, and whether its code may run."""


@dataclass
class LoadCall:
    """One call of `from_pretrained` with a recipe."""

    source: str
    """The name or folder that was passed."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """All arguments by name, those that transformers has resolved meanwhile (revision) as resolved."""

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Those of the arguments that every other `from_pretrained` of the same repository needs, too."""
        return {name: self.arguments[name] for name in HUB_ARGUMENTS if self.arguments.get(name) is not None}


_current: ContextVar[LoadCall | None] = ContextVar("load_call", default=None)


def current_call() -> LoadCall | None:
    """Returns the call that this code runs in; None outside `from_pretrained`, or if it has no recipe."""
    return _current.get()


@contextmanager
def _calling(source: Any, arguments: dict[str, Any]) -> Iterator[LoadCall | None]:
    """Makes the call current inside the context.

    An Auto class calls the model's class. Both are one call, of which the model's class knows more. A call without a
    recipe inside one with a recipe, such as that of a backbone, is none of its business.
    """
    call = _current.get()
    if not isinstance(arguments.get("quantization_config"), AwqOffloadConfig):
        call = None
    elif call is not None:
        call.arguments |= arguments
    else:
        call = LoadCall(str(source), arguments)
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def remember_calls() -> None:
    """Wraps `from_pretrained` of models and Auto classes; call it once."""
    for owner in (PreTrainedModel, *_with_subclasses(_BaseAutoModelClass)):
        if "from_pretrained" in vars(owner):  # Auto classes have copies of the base class's method
            method = vars(owner)["from_pretrained"].__func__
            cast(Any, owner).from_pretrained = classmethod(_remembered(method))


def _with_subclasses(base: type) -> Iterator[type]:
    yield base
    for subclass in base.__subclasses__():
        yield from _with_subclasses(subclass)


def _remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("quantization_config"), AwqOffloadConfig) and _current.get() is None:
            return method(cls, *args, **kwargs)
        bound = signature.bind_partial(cls, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if name not in ("cls", "model_args", "kwargs")}
        source = named.pop("pretrained_model_name_or_path", None)
        with _calling(source, named | kwargs):
            return method(cls, *args, **kwargs)

    return from_pretrained
