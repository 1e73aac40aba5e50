"""Decoder layers: which modules they are, what the model gives each of them, and how to run one alone.

The skeleton pass runs the model's own forward with every decoder layer replaced by "write down what you were given,
return the hidden states unchanged". What it yields is exact for every layer: masks and rotary embeddings differ
from layer to layer in many models (sliding and global attention, two rotary bases), so what layer 0 was given says
nothing about layer 1. Modules keep their class and attributes; only `forward` is shadowed, and put back afterwards.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .errors import ModelStructureError


class _Hidden:
    """Stands in recorded arguments where the hidden states go."""

    def __repr__(self) -> str:
        return "<hidden states>"


HIDDEN = _Hidden()


class NotAChainError(ModelStructureError):
    """The decoder layers do not simply hand their hidden states on; `feeds.py` then halts real forward passes."""


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one call of a decoder layer; `HIDDEN` marks the place of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(
        self, hidden: Tensor, move: Callable[[Tensor], Tensor], share_state: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `hidden` in its place; `move` is applied to every tensor (device, dtype).

        Containers that a layer may write to (dicts, lists and objects of other kinds) are copied, so that a call
        leaves no trace in them; with `share_state` they are passed on themselves, their tensors moved in place.
        """

        def fill(value: Any) -> Any:
            if value is HIDDEN:
                return move(hidden)
            return move(value) if isinstance(value, Tensor) else value

        args = tuple(map_leaves(value, fill, share_state) for value in self.args)
        return args, {name: map_leaves(value, fill, share_state) for name, value in self.kwargs.items()}


def map_leaves(value: Any, fill: Callable[[Any], Any], in_place: bool = False) -> Any:
    """`value` with `fill` applied to everything that is no container; mutable containers copied, unless `in_place`."""
    if isinstance(value, tuple):
        items = [map_leaves(item, fill, in_place) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, MutableMapping):
        target = value if in_place else copy.copy(value)
        for key in list(value):
            target[key] = map_leaves(value[key], fill, in_place)
        return target
    if isinstance(value, list):
        items = [map_leaves(item, fill, in_place) for item in value]
        if not in_place:
            return items
        value[:] = items
        return value
    if is_state(value) and not in_place:
        return copy.deepcopy(value)
    return fill(value)


def is_state(value: Any) -> bool:
    """Whether layers could pass something on by writing it into `value`."""
    if isinstance(value, MutableMapping | list):
        return True
    plain = (Tensor, str, bytes, int, float, complex, tuple, frozenset, torch.dtype, torch.device, nn.Module, _Hidden)
    return not (value is None or isinstance(value, (*plain, PreTrainedConfig, slice)) or callable(value))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested containers, in their order."""
    found: list[Tensor] = []
    map_leaves(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


@dataclass
class Skeleton:
    """What a skeleton pass recorded."""

    layer_names: list[str] = field(default_factory=list)
    """Decoder layers in the order in which the model runs them."""
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    """Per layer, the call that it receives for every batch."""
    hidden: list[Tensor] = field(default_factory=list)
    """Per batch, the hidden states that enter the first layer, (batch, tokens, hidden)."""


def candidate_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Elements of the outermost module lists that hold linears: what may turn out to be decoder layers.

    A linear that itself stands in a list is a projection, not a layer.
    """
    found: dict[str, nn.Module] = {}
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(list_name.startswith(f"{name}.") for name in found):
            continue
        for name, element in module.named_children():
            is_layer = not isinstance(element, nn.Linear | nn.ModuleList | nn.ModuleDict)
            if is_layer and any(isinstance(part, nn.Linear) for part in element.modules()):
                found[f"{list_name}.{name}" if list_name else name] = element
    if not found:
        holds = " Its projections are Conv1D modules, which no AWQ loader knows." if _has_conv1d(model) else ""
        raise ModelStructureError(
            f"{type(model).__name__} has no list of layers that hold nn.Linear modules; there is nothing to quantize."
            f"{holds} Expected a decoder whose layers stand in an nn.ModuleList."
        )
    return found


def shared_parameters(model: nn.Module) -> dict[str, set[str]]:
    """Decoder layer -> names, within it, of parameters that another layer or the rest of the model uses too."""
    users: dict[int, set[str]] = defaultdict(set)
    named: dict[str, dict[str, nn.Parameter]] = {}
    inside: set[str] = set()
    for layer_name, layer in candidate_layers(model).items():
        named[layer_name] = dict(layer.named_parameters(remove_duplicate=False))
        inside.update(f"{layer_name}.{name}" for name in named[layer_name])
        for parameter in named[layer_name].values():
            users[id(parameter)].add(layer_name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in inside:
            users[id(parameter)].add("")
    return {
        layer_name: {name for name, parameter in parameters.items() if len(users[id(parameter)]) > 1}
        for layer_name, parameters in named.items()
    }


def _has_conv1d(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def record_skeleton(
    model: nn.Module,
    batches: Sequence[Tensor],  # each (batch, tokens) int64 token ids, without padding
) -> Skeleton:
    """Run `model` over `batches` with its decoder layers stubbed and return what each layer would be given.

    Args that are equal from batch to batch, or shared between layers, are stored once. A layer's own forward runs
    once per layer class, on the first batch, to learn what form of output the model expects: make it a short one.

    On the first batch gradients tell what depends on the hidden states of an earlier layer.

    Raises:
        NotAChainError: a layer runs twice in a pass, or takes anything from earlier layers beside the hidden states
            that the last one returned (something computed between the layers, shared state).
        ModelStructureError: no decoder layer ran, or the hidden states can't be told.
    """
    layers = candidate_layers(model)
    skeleton = Skeleton()
    recorder = _Recorder(skeleton)
    decoder = getattr(model, "base_model", model)  # without the head: its logits over all batches are not needed
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(calibration_mode(model))
        stack.enter_context(_frozen(model))
        for name, layer in layers.items():
            stack.enter_context(shadowed_forward(layer, recorder.stub(name, layer)))
        for index, batch in enumerate(batches):
            recorder.next_batch(trace=index == 0)
            with torch.set_grad_enabled(index == 0):
                decoder(input_ids=batch, use_cache=False)
            recorder.end_batch(type(model).__name__)
    return skeleton


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no KV cache, restored afterwards, whatever happens inside.

    A module that is replaced inside the context leaves its mode to the one in its place.
    """
    training = {name: module.training for name, module in model.named_modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    use_cache = [(config, config.use_cache) for config in configs if getattr(config, "use_cache", None) is not None]
    model.eval()
    for config, _ in use_cache:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in use_cache:
            config.use_cache = value
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class LayerRunner:
    """Runs one decoder layer on recorded calls, on a given device and in a given dtype.

    Args:
        layer: the decoder layer, already on `device`.
        device: where it computes.
        dtype: floating-point tensors (weights and arguments) are cast to it for the computation; the layer's own
            weights stay as they are. None computes in the layer's dtype.
    """

    def __init__(self, layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None):
        self.layer = layer
        self.device = device
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}
        if dtype is not None:
            named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            self.tensors = {name: self._move(tensor.detach()) for name, tensor in named}

    @torch.no_grad()
    def __call__(
        self,
        call: LayerCall,
        hidden: Tensor,  # (batch, tokens, hidden)
        overrides: dict[str, Tensor] | None = None,  # parameter name -> tensor used in its place
    ) -> Tensor:
        """The layer's output hidden states, (batch, tokens, hidden), on `device`."""
        return output_hidden(self.run(call.bind(hidden, self._move), overrides))

    @torch.no_grad()
    def observe(
        self,
        call: LayerCall,
        hidden: Tensor,  # (batch, tokens, hidden)
        overrides: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Every floating-point tensor that the call yields: in what the layer returns, and in state it writes to."""
        bound = call.bind(hidden, self._move)
        yielded = (self.run(bound, overrides), [value for value in (*bound[0], *bound[1].values()) if is_state(value)])
        return [tensor for tensor in tensors_in(yielded) if tensor.is_floating_point()]

    @torch.no_grad()
    def hand_on(self, call: LayerCall, like: Tensor | None) -> Any:
        """Whatever the layer returns, its tensors on `like`'s device and, if they are not integers, in its dtype.

        State among the call's arguments is written to.
        """
        output = self.run(call.bind(torch.empty(0), self._move, share_state=True))

        def back(leaf: Any) -> Any:
            if like is None or not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device=like.device, dtype=like.dtype if leaf.is_floating_point() else None)

        return map_leaves(output, back, in_place=True)

    def run(self, bound: tuple[tuple[Any, ...], dict[str, Any]], overrides: dict[str, Tensor] | None = None) -> Any:
        """What the layer returns for arguments that are bound already."""
        args, kwargs = bound
        if self.tensors or overrides:
            return torch.func.functional_call(self.layer, {**self.tensors, **(overrides or {})}, args, kwargs)
        return self.layer(*args, **kwargs)

    def _move(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype, non_blocking=True)


def output_hidden(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: a tensor, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class _Recorder:
    """Builds a `Skeleton` from the calls that reach the stubs."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton = skeleton
        self.learned_outputs: dict[type, Any] = {}
        self.stored: dict[tuple[str, int], Tensor] = {}
        self.called: list[str] = []

    def next_batch(self, trace: bool = False) -> None:
        """`trace`: let what is computed from a layer's output require a gradient."""
        self.trace = trace
        self.called = []
        self.last_hidden: Tensor | None = None
        self.state: dict[int, tuple[Any, str]] = {}
        self.handed_out: dict[int, Tensor] = {}  # what layers returned beside hidden states, by id
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def end_batch(self, model_name: str) -> None:
        if not self.called:
            raise ModelStructureError(
                f"The forward pass of {model_name} ran none of its candidate decoder layers; expected a causal "
                "language model that takes input_ids."
            )
        if not self.skeleton.layer_names:
            self.skeleton.layer_names = self.called
        elif self.called != self.skeleton.layer_names:
            raise ModelStructureError(
                f"The forward pass of {model_name} ran its layers in another order on another batch: "
                f"{self.called} after {self.skeleton.layer_names}. Layers that are skipped at random must be switched "
                "off for calibration."
            )

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
            self.skeleton.calls.setdefault(name, []).append(call)
            # A tensor of its own, so that what the layer was given is not mistaken for what it returns.
            self.last_hidden = self._traced(hidden) if self.trace else hidden.view_as(hidden)
            learned = self.learned_outputs[type(layer)]
            if isinstance(learned, Tensor):
                return self.last_hidden
            others = map_leaves(learned[1:], self._traced) if self.trace else learned[1:]
            self.handed_out |= {id(tensor): tensor for tensor in tensors_in(others)}
            return (self.last_hidden, *others)

        return record

    @staticmethod
    def _traced(leaf: Any) -> Any:
        """`leaf`; a floating-point tensor so that what is computed from it requires a gradient."""
        is_floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().requires_grad_() * 1 if is_floating else leaf

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
    """The hidden states among a layer's arguments: its first parameter, by position or by name."""
    first = next(parameter for parameter in signature.parameters if parameter != "self")
    hidden = args[0] if args else kwargs.get(first)
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise ModelStructureError(
            f"Decoder layer {name} was called with {type(hidden).__name__} for its first parameter {first!r}; expected "
            "the hidden states, a floating-point tensor."
        )
    return hidden


@contextmanager
def shadowed_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for the module's own (an instance attribute, or accelerate's wrapper, survives)."""
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original
