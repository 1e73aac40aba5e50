"""The skeleton pass: records what the model gives each of its decoder layers on every batch, without running them.

The model's own forward runs, and every decoder layer only records its arguments and returns the hidden states
unchanged. The record is exact for every layer. In many models masks and rotary embeddings differ from layer to layer
(sliding and global attention, two rotary bases), so the arguments of layer 0 say nothing about layer 1. Modules keep
their class and attributes; only `forward` is shadowed, and restored afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelStructureError
from ..model.decoder_layers import (
    HIDDEN,
    LayerCall,
    calibration_mode,
    candidate_layers,
    is_state,
    map_leaves,
    shadowed_forward,
    tensors_in,
)
from .forward_pass import ForwardPass, ModelInputs, kind_of


class NotAChainError(ModelStructureError):
    """The decoder layers do not simply pass their hidden states on; `layer_inputs.py` then pauses forward passes."""


@dataclass
class Skeleton:
    """Holds what a skeleton pass recorded."""

    layer_names: list[str] = field(default_factory=list)
    """Decoder layers in the order in which the model runs them."""
    calls: dict[str, dict[int, LayerCall]] = field(default_factory=dict)
    """Layer -> index of a batch that reaches it -> the call."""
    hidden: list[Tensor] = field(default_factory=list)
    """Hidden states that enter the first layer, one tensor (batch, tokens, hidden) per batch."""
    outputs: dict[type, Any] = field(default_factory=dict)
    """Class of a layer -> what one layer of this class returned on the first batch."""


def record_skeleton(
    model: nn.Module,
    batches: Iterable[ModelInputs],
    layers: Mapping[str, nn.Module] | None = None,  # name -> decoder layer; by default all that may be one
    forward: Callable[[ModelInputs], None] | None = None,
) -> Skeleton:
    """Runs `model` over `batches` with its decoder layers stubbed; returns what each layer would be given.

    Arguments that are equal from batch to batch, or shared between layers, are stored once. One layer of each class
    runs on the first batch, to show what form of output the model expects: make that batch a short one.

    On the first batch of each kind, gradients tell what depends on the hidden states of an earlier layer.

    Raises:
        NotAChainError: a layer runs twice in a pass, or takes anything from earlier layers beside the hidden states
            that the last one returned (something computed between the layers, shared state).
        ModelStructureError: no decoder layer ran, or it is unclear which argument holds the hidden states.
    """
    forward = forward or ForwardPass(model)
    layers = candidate_layers(model) if layers is None else layers
    recorder = _Recorder(type(model).__name__)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(calibration_mode(model))
        stack.enter_context(frozen(model))
        for name, layer in layers.items():
            stack.enter_context(shadowed_forward(layer, recorder.stub(name, layer)))
        for batch in batches:
            is_first = recorder.next_batch(kind_of(batch))
            with torch.set_grad_enabled(is_first):
                forward(batch)
            recorder.end_batch()
    return recorder.finished()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freezes all parameters inside the context, and checks on exit that none was changed.

    Raises:
        ModelStructureError: on exit, if the model's own code has changed a parameter in place. The change would be
            saved with the checkpoint, and made once more after loading.
    """
    versions = {name: (parameter, parameter._version) for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    for name, (parameter, version) in versions.items():
        if parameter._version != version:
            raise ModelStructureError(
                f"The forward pass of {type(model).__name__} changes its own weights in place ({name}); a checkpoint "
                "of what it changed would be changed again after loading. Expected weights that are only read: switch "
                "this off in the model's config."
            )


def requiring_grad(value: Any) -> Any:
    """Returns a floating-point tensor such that what is computed from it requires a gradient; all else as it is."""
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() * 1 if is_floating else value


Step = TypeVar("Step", bound=Hashable)


def merged(orders: Iterable[Sequence[Step]], model_name: str) -> list[Step]:
    """Merges orders into one that keeps each of them; layers that only some batches run find their place in it.

    Raises:
        ModelStructureError: two orders contradict each other.
    """
    sorter: TopologicalSorter[Step] = TopologicalSorter()
    for order in orders:
        for step in order:
            sorter.add(step)
        for before, after in pairwise(order):
            sorter.add(after, before)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise ModelStructureError(
            f"The forward pass of {model_name} runs its layers in another order on batches of another kind: "
            f"{error.args[1]}."
        ) from error


class _Recorder:
    """Builds a `Skeleton` from the calls that reach the stubs."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.skeleton = Skeleton()
        self.learned_outputs: dict[type, Any] = {}
        self.stored: dict[tuple[str, int], Tensor] = {}
        self.orders: dict[frozenset[str], list[str]] = {}
        """Kind of batch -> the layers in the order in which they run."""

    def next_batch(self, kind: frozenset[str]) -> bool:
        """Begins a batch; returns whether it is the first of its kind: in that one, outputs require a gradient."""
        self.kind, self.trace = kind, kind not in self.orders
        self.called: list[str] = []
        self.last_hidden: Tensor | None = None
        self.state: dict[int, tuple[Any, str]] = {}
        self.handed_out: dict[int, Tensor] = {}  # what layers returned beside hidden states, by id
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        return self.trace

    def end_batch(self) -> None:
        if not self.called:
            raise ModelStructureError(
                f"The forward pass of {self.model_name} ran none of its candidate decoder layers; expected a causal "
                "language model that takes input_ids."
            )
        if self.called != self.orders.setdefault(self.kind, self.called):
            raise ModelStructureError(
                f"The forward pass of {self.model_name} ran its layers in another order on another batch: "
                f"{self.called} after {self.orders[self.kind]}. Layers that are skipped at random must be switched "
                "off for calibration."
            )

    def finished(self) -> Skeleton:
        """Returns what was recorded, its layers in one order for all kinds of batches."""
        self.skeleton.layer_names = merged(self.orders.values(), self.model_name)
        self.skeleton.outputs = self.learned_outputs
        return self.skeleton

    def stub(self, name: str, layer: nn.Module) -> Callable[..., Any]:
        signature = inspect.signature(type(layer).forward)
        forward = layer.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            if name in self.called:
                raise NotAChainError(
                    f"Decoder layer {name} runs twice in one forward pass; layers that are shared in depth are not "
                    "supported."
                )
            hidden = _find_hidden(name, signature, args, kwargs)
            if type(layer) not in self.learned_outputs:
                with torch.no_grad():
                    self.learned_outputs[type(layer)] = forward(*args, **kwargs)
            if not self.called:
                self.skeleton.hidden.append(hidden)
            elif hidden is not self.last_hidden:
                raise NotAChainError(
                    f"Decoder layer {name} does not receive what {self.called[-1]} returned: the model computes "
                    "something between its layers, which is not supported."
                )
            self.called.append(name)
            call = self._store(name, hidden, args, kwargs)
            self.skeleton.calls.setdefault(name, {})[len(self.skeleton.hidden) - 1] = call
            # A tensor of its own, so that what the layer was given is not mistaken for what it returns.
            self.last_hidden = requiring_grad(hidden) if self.trace else hidden.view_as(hidden)
            learned = self.learned_outputs[type(layer)]
            if isinstance(learned, Tensor):
                return self.last_hidden
            others = map_leaves(learned[1:], requiring_grad) if self.trace else learned[1:]
            self.handed_out |= {id(tensor): tensor for tensor in tensors_in(others)}
            return (self.last_hidden, *others)

        return record

    def _store(self, name: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        position = 0

        for value in (*args, *kwargs.values()):
            if is_state(value) and self.state.setdefault(id(value), (value, name))[1] != name:
                raise NotAChainError(
                    f"Decoder layer {name} receives a {type(value).__name__} that layer {self.state[id(value)][1]} "
                    "received too; layers can pass state on in it."
                )

        def keep(leaf: Any) -> Any:
            nonlocal position
            if leaf is hidden:
                return HIDDEN
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.requires_grad or id(leaf) in self.handed_out:
                raise NotAChainError(
                    f"Decoder layer {name} receives something beside its hidden states that is computed from those of "
                    "an earlier layer."
                )
            position += 1
            if id(leaf) not in self.seen:
                # Without padding, masks and positions depend on a batch's shape alone: mostly the last one's serve.
                previous = self.stored.get((name, position))
                same = previous is not None and previous.shape == leaf.shape and torch.equal(previous, leaf)
                self.seen[id(leaf)] = (leaf, previous if same and previous is not None else leaf)
            kept = self.seen[id(leaf)][1]
            self.stored[name, position] = kept
            return kept

        stored_args = tuple(map_leaves(value, keep) for value in args)
        return LayerCall(stored_args, {key: map_leaves(value, keep) for key, value in kwargs.items()})


def _find_hidden(name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the hidden states among a layer's arguments: its first parameter, by position or by name."""
    first = next(parameter for parameter in signature.parameters if parameter != "self")
    hidden = args[0] if args else kwargs.get(first)
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise ModelStructureError(
            f"Decoder layer {name} was called with {type(hidden).__name__} for its first parameter {first!r}; expected "
            "the hidden states, a floating-point tensor."
        )
    return hidden
