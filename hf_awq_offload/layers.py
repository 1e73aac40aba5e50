"""Decoder layers: which modules they are, what the model gives each of them, and how to run one alone.

The skeleton pass runs the model's own forward with every decoder layer replaced by "write down what you were given,
return the hidden states unchanged". What it yields is exact for every layer: masks and rotary embeddings differ
from layer to layer in many models (sliding and global attention, two rotary bases), so what layer 0 was given says
nothing about layer 1. Modules keep their class and attributes; only `forward` is shadowed, and put back afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .errors import ModelStructureError


class _Hidden:
    """Stands in recorded arguments where the hidden states go."""

    def __repr__(self) -> str:
        return "<hidden states>"


HIDDEN = _Hidden()


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one call of a decoder layer; `HIDDEN` marks the place of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(self, hidden: Tensor, move: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `hidden` in its place; `move` is applied to every tensor (device, dtype)."""

        def fill(leaf: Any) -> Any:
            if leaf is HIDDEN:
                return move(hidden)
            return move(leaf) if isinstance(leaf, Tensor) else leaf

        return tree_map(fill, (self.args, self.kwargs))


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
    """Elements of the outermost module lists that hold linears: what may turn out to be decoder layers."""
    found: dict[str, nn.Module] = {}
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(list_name.startswith(f"{name}.") for name in found):
            continue
        for name, element in module.named_children():
            if any(isinstance(part, nn.Linear) for part in element.modules()):
                found[f"{list_name}.{name}" if list_name else name] = element
    if not found:
        raise ModelStructureError(
            f"{type(model).__name__} has no list of layers that hold nn.Linear modules; there is nothing to quantize. "
            "Expected a decoder whose layers stand in an nn.ModuleList."
        )
    return found


def record_skeleton(
    model: nn.Module,
    batches: Sequence[Tensor],  # each (batch, tokens) int64 token ids, without padding
) -> Skeleton:
    """Run `model` over `batches` with its decoder layers stubbed and return what each layer would be given.

    Args that are equal from batch to batch, or shared between layers, are stored once. A layer's own forward runs
    once per layer class, on the first batch, to learn what form of output the model expects: make it a short one.

    Raises:
        ModelStructureError: no decoder layer ran, a layer ran twice in a pass, or its hidden states can't be told.
    """
    layers = candidate_layers(model)
    skeleton = Skeleton()
    recorder = _Recorder(skeleton)
    decoder = getattr(model, "base_model", model)  # without the head: its logits over all batches are not needed
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(calibration_mode(model))
        for name, layer in layers.items():
            stack.enter_context(_shadowed_forward(layer, recorder.stub(name, layer)))
        for batch in batches:
            recorder.next_batch()
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
            module.training = training[name]


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
        args, kwargs = call.bind(hidden, self._move)
        if self.tensors or overrides:
            output = torch.func.functional_call(self.layer, {**self.tensors, **(overrides or {})}, args, kwargs)
        else:
            output = self.layer(*args, **kwargs)
        return output_hidden(output)

    def _move(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype, non_blocking=True)


def output_hidden(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: a tensor, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def linears_in(layer: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside `layer` by its name there, in the order of definition."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


class _Recorder:
    """Builds a `Skeleton` from the calls that reach the stubs."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton = skeleton
        self.learned_outputs: dict[type, Any] = {}
        self.stored: dict[tuple[str, int], Tensor] = {}
        self.called: list[str] = []

    def next_batch(self) -> None:
        self.called = []
        self.last_hidden: Tensor | None = None
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
                raise ModelStructureError(
                    f"Decoder layer {name} runs twice in one forward pass; layers that are shared in depth are not "
                    "supported."
                )
            hidden = _find_hidden(name, signature, args, kwargs)
            if type(layer) not in self.learned_outputs:
                self.learned_outputs[type(layer)] = forward(*args, **kwargs)
            if not self.called:
                self.skeleton.hidden.append(hidden)
            elif hidden is not self.last_hidden:
                raise ModelStructureError(
                    f"Decoder layer {name} does not receive what {self.called[-1]} returned: the model computes "
                    "something between its layers, which is not supported."
                )
            self.last_hidden = hidden
            self.called.append(name)
            call = self._store(name, hidden, args, kwargs)
            self.skeleton.calls.setdefault(name, []).append(call)
            learned = self.learned_outputs[type(layer)]
            return hidden if isinstance(learned, Tensor) else (hidden, *learned[1:])

        return record

    def _store(self, name: str, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        position = 0

        def keep(leaf: Any) -> Any:
            nonlocal position
            if leaf is hidden:
                return HIDDEN
            if not isinstance(leaf, Tensor):
                return leaf
            position += 1
            if id(leaf) not in self.seen:
                # Without padding, masks and positions depend on a batch's shape alone: mostly the last one's serve.
                previous = self.stored.get((name, position))
                same = previous is not None and previous.shape == leaf.shape and torch.equal(previous, leaf)
                self.seen[id(leaf)] = (leaf, previous if same and previous is not None else leaf)
            kept = self.seen[id(leaf)][1]
            self.stored[name, position] = kept
            return kept

        stored_args, stored_kwargs = tree_map(keep, (args, kwargs))
        return LayerCall(stored_args, stored_kwargs)


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
def _shadowed_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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
