"""Decoder layers: which modules may be one, what a call of one is, and how to run one alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import ModelStructureError
from ..nn.quantized_linear import packed_tensors
from ..ops.blocks import matmul_dtype


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


@dataclass(frozen=True)
class ProbeCalls:
    """Short inputs for one layer, fp32-castable: several tokens, and a single one."""

    several: tuple[LayerCall, Tensor]
    single: tuple[LayerCall, Tensor]


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
    tensors: list[Tensor] = []
    map_leaves(value, lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None)
    return tensors


def candidate_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Elements of the outermost module lists that hold linears: what may turn out to be decoder layers.

    A linear that itself stands in a list is a projection, not a layer.
    """
    layers: dict[str, nn.Module] = {}
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(list_name.startswith(f"{name}.") for name in layers):
            continue
        for name, element in module.named_children():
            is_layer = not isinstance(element, nn.Linear | nn.ModuleList | nn.ModuleDict)
            if is_layer and any(isinstance(part, nn.Linear) for part in element.modules()):
                layers[f"{list_name}.{name}" if list_name else name] = element
    if not layers:
        holds = " Its projections are Conv1D modules, which no AWQ loader knows." if _has_conv1d(model) else ""
        raise ModelStructureError(
            f"{type(model).__name__} has no list of layers that hold nn.Linear modules; there is nothing to quantize."
            f"{holds} Expected a decoder whose layers stand in an nn.ModuleList."
        )
    return layers


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


class LayerRunner:
    """Runs one decoder layer on recorded calls, on a given device and in a given dtype.

    Args:
        layer: the decoder layer, already on `device`.
        device: where it computes.
        dtype: floating-point tensors (weights and arguments) are cast to it for the computation; the layer's own
            weights stay as they are, and so do packed ones. None computes in the layer's dtype.
    """

    def __init__(self, layer: nn.Module, device: torch.device, dtype: torch.dtype | None = None):
        self.layer = layer
        self.device = device
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}
        if dtype is not None:
            named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            packed = packed_tensors(layer)
            self.tensors = {name: self._move(tensor.detach()) for name, tensor in named if name not in packed}

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
    def run_for_caller(self, call: LayerCall, like: Tensor | None, forward: Callable[..., Any] | None = None) -> Any:
        """Runs the layer in its caller's stead; returns whatever it returns, on the device and in the dtype of `like`.

        Integers keep their dtype. State among the call's arguments is written to. With `forward`, which is the layer's
        own, the layer is not called as a module: this runs inside the module's call, whose hooks run already.
        """
        bound = call.bind(torch.empty(0), self._move, share_state=True)
        output = self.run(bound) if forward is None else self._run_inside(forward, bound)

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

    def _run_inside(self, forward: Callable[..., Any], bound: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = bound
        if not self.tensors:
            return forward(*args, **kwargs)
        caller = nn.Module()
        caller.layer = self.layer
        caller.forward = forward
        tensors = {f"layer.{name}": tensor for name, tensor in self.tensors.items()}
        return torch.func.functional_call(caller, tensors, args, kwargs)

    def _move(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype, non_blocking=True)


def runner_on(layer: nn.Module, device: torch.device) -> LayerRunner:
    """Returns a runner of a layer that is on `device`, in the dtype that this device multiplies fast in."""
    packed = packed_tensors(layer)
    dtypes = (parameter.dtype for name, parameter in layer.named_parameters() if name not in packed)
    dtype = next(dtypes, torch.float32)
    computed = matmul_dtype(device.type, dtype)
    return LayerRunner(layer, device, None if computed == dtype else computed)


def output_hidden(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: a tensor, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


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
