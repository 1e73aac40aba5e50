"""Remembers the call of `from_pretrained` that a model is loaded in, so that its arguments reach everything.

transformers hands a quantizer the model and its files, but not where they come from: revision, token, cache_dir and
the like. `remember_calls` wraps the two methods that every load goes through, those of `PreTrainedModel` and of the
Auto classes. Calls without a recipe run unchanged: their arguments serve checkpoints that are quantized already, and
models that `quantize_model` is given later.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..checkpoint.source import Source
from ..config import AwqOffloadConfig
from ..logs import without_bars_in_log_files
from .config_look import building
from .one_at_a_time import one_at_a_time, warn_of_loading_meanwhile
from .source_reading import SourceReading

HUB_ARGUMENTS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("trust_remote_code", "code_revision"),
)
"""Arguments that say where a checkpoint's files come from, and whether its code may run."""


@dataclass
class LoadCall:
    """One call of `from_pretrained`."""

    source: str
    """The name or folder that was passed."""
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    """All arguments by name, those that transformers has resolved meanwhile (revision) as resolved."""
    has_recipe: bool = True
    is_of_auto_class: bool = True
    """Whether an Auto class finds the model's class by its config.json."""
    is_streamed: bool = False
    """Whether weights stay on the disk, and quantizing is left to the caller."""
    opened: Source | None = None
    """The source, if its files were found before transformers looked for them."""
    quantization: dict[str, Any] | None = None
    """The quantization config of the source, which is hidden from transformers."""
    reading: SourceReading | None = None
    """Reads the source for transformers."""
    is_built: bool = False
    """Whether the model stands on the meta device."""

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Those of the arguments that every other `from_pretrained` of the same repository needs, too."""
        return {name: self.arguments[name] for name in HUB_ARGUMENTS if self.arguments.get(name) is not None}


_current: ContextVar[LoadCall | None] = ContextVar("load_call", default=None)
_is_only_loading: ContextVar[bool] = ContextVar("is_only_loading", default=False)
_is_only_opening: ContextVar[bool] = ContextVar("is_only_opening", default=False)


@contextmanager
def only_loading(to_quantize: bool = True) -> Iterator[None]:
    """Lets `from_pretrained` with a recipe prepare a model inside the context, and leave quantizing to the caller.

    A model that nobody will quantize may have nothing that can be, and needs no data: its recipe says only where its
    weights stay.
    """
    token, other = _is_only_loading.set(True), _is_only_opening.set(not to_quantize)
    try:
        yield
    finally:
        _is_only_loading.reset(token)
        _is_only_opening.reset(other)


def is_only_loading() -> bool:
    """Whether this runs inside `only_loading`."""
    return _is_only_loading.get()


def is_only_opening() -> bool:
    """Whether this runs inside `only_loading`, for a model that nobody will quantize."""
    return _is_only_opening.get()


def current_call() -> LoadCall | None:
    """Returns the call that this code runs in; None outside `from_pretrained`, or if it has no recipe."""
    call = _current.get()
    return call if call is not None and call.has_recipe else None


def enclosing_call() -> LoadCall | None:
    """Returns the call that this code runs in, with a recipe or without; None outside `from_pretrained`."""
    return _current.get()


def remember_calls(
    look: Callable[[LoadCall], None],
    explain: Callable[[LoadCall, ValueError], None],
    note_loaded: Callable[[PreTrainedModel], None],
) -> None:
    """Wraps `from_pretrained` of models and Auto classes; call it once.

    Args:
        look: is given each call with a recipe before transformers does anything; may raise an error.
        explain: may raise a better error than the one that transformers has raised in such a call.
        note_loaded: is called with every model that was loaded without a recipe, while its call is current.
    """
    for owner in (PreTrainedModel, *_with_subclasses(_BaseAutoModelClass)):
        if "from_pretrained" in vars(owner):  # Auto classes have copies of the base class's method
            method = vars(owner)["from_pretrained"].__func__
            cast(Any, owner).from_pretrained = classmethod(_remembered(method, look, explain, note_loaded))


def _with_subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _remembered(
    method: Callable[..., Any],
    look: Callable[[LoadCall], None],
    explain: Callable[[LoadCall, ValueError], None],
    note_loaded: Callable[[PreTrainedModel], None],
) -> Callable[..., Any]:
    signature = inspect.signature(method, follow_wrapped=False)

    @functools.wraps(method)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        has_recipe = isinstance(kwargs.get("quantization_config"), AwqOffloadConfig)
        if has_recipe and kwargs.get("trust_remote_code") is None and not can_be_asked():
            kwargs["trust_remote_code"] = False  # transformers would wait for an answer
        bound = signature.bind_partial(cls, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if name not in ("cls", "model_args", "kwargs")}
        source = named.pop("pretrained_model_name_or_path", None)
        outer = _current.get()
        with _calling(str(source or ""), named | kwargs) as call:
            if not has_recipe:
                warn_of_loading_meanwhile()
                loaded = method(cls, *args, **kwargs)
                if isinstance(loaded, PreTrainedModel):
                    note_loaded(loaded)
                return loaded
            if call is outer:
                return method(cls, *args, **kwargs)
            call.is_of_auto_class = issubclass(cls, _BaseAutoModelClass)
            with one_at_a_time(), without_bars_in_log_files():
                look(call)
                try:
                    with _bounded(call):
                        return method(cls, *args, **kwargs)
                except ValueError as error:
                    explain(call, error)
                    raise

    return from_pretrained


def _bounded(call: LoadCall) -> AbstractContextManager[None]:
    """Bounds what transformers builds from a config.json that may say anything, unless its code may do anything."""
    if call.opened is None or call.arguments.get("trust_remote_code"):
        return nullcontext()
    return building(len(call.opened.tensors), lambda: call.is_built)


def can_be_asked() -> bool:
    """Whether there is a terminal at which a user can answer."""
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


@contextmanager
def _calling(source: str, arguments: dict[str, Any]) -> Iterator[LoadCall]:
    """Makes the call current inside the context.

    An Auto class calls the model's class. With a recipe, both are one call, of which the model's class knows more. Any
    other call inside one, such as that of a backbone, is a call of its own.
    """
    call = _current.get()
    has_recipe = isinstance(arguments.get("quantization_config"), AwqOffloadConfig)
    if call is not None and call.has_recipe and has_recipe:
        call.arguments |= arguments
    else:
        call = LoadCall(source, arguments, has_recipe, is_streamed=_is_only_loading.get())
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)
