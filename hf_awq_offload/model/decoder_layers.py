"""Finds the modules that may be decoder layers, represents a call of one, and runs a layer on its own."""

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
from ..transfers import sent


class _Hidden:
    """A placeholder for the hidden states in recorded arguments."""

    def __repr__(self) -> str:
        return "<hidden states>"


HIDDEN = _Hidden()


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one call of a decoder layer; `HIDDEN` stands for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(
        self, hidden: Tensor, move: Callable[[Tensor], Tensor], share_state: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with `hidden` filled in and `move` (device, dtype) applied to every tensor.

        Containers that a layer may write to (dicts, lists and other objects) are copied, so that a call leaves no trace
        in them. With `share_state` the containers themselves are passed on, and their tensors are moved in place.
        """

        def fill(value: Any) -> Any:
            if value is HIDDEN:
                return move(hidden)
            return move(value) if isinstance(value, Tensor) else value

        args = tuple(map_leaves(value, fill, share_state) for value in self.args)
        return args, {name: map_leaves(value, fill, share_state) for name, value in self.kwargs.items()}


@dataclass(frozen=True)
class ProbeCalls:
    """Short inputs for one layer, castable to fp32: one call with several tokens, and one with a single token."""

    several: tuple[LayerCall, Tensor]
    single: tuple[LayerCall, Tensor]


def map_leaves(value: Any, fill: Callable[[Any], Any], in_place: bool = False) -> Any:
    """Applies `fill` to everything in `value` that is not a container; copies mutable containers unless `in_place`."""
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
    """Returns whether layers could pass data to each other by writing it into `value`."""
    if isinstance(value, MutableMapping | list):
        return True
    plain = (Tensor, str, bytes, int, float, complex, tuple, frozenset, torch.dtype, torch.device, nn.Module, _Hidden)
    return not (value is None or isinstance(value, (*plain, PreTrainedConfig, slice)) or callable(value))


def tensors_in(value: Any) -> list[Tensor]:
    """Returns every tensor in nested containers, in order."""
    tensors: list[Tensor] = []
    map_leaves(value, lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None)
    return tensors


def observed_tensors(bound: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> list[Tensor]:
    """Returns the floating-point tensors of a layer's output, and of the state among the arguments it was called on."""
    yielded = (output, [value for value in (*bound[0], *bound[1].values()) if is_state(value)])
    return [tensor for tensor in tensors_in(yielded) if tensor.is_floating_point()]


def candidate_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the candidates for decoder layers by name: elements of the outermost module lists that contain linears.

    A linear that is itself an element of a list is a projection, not a layer.

    Raises:
        ModelStructureError: there are none.
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
    """Maps every decoder layer to the names, within it, of parameters that another module of the model also uses.

    Two Parameters of one memory are one here, since a change of either is a change of both.
    """
    users: dict[object, set[tuple[str, int]]] = defaultdict(set)  # memory -> (layer, its owner in there)
    named: dict[str, dict[str, nn.Parameter]] = {}
    inside: set[str] = set()
    for layer_name, layer in candidate_layers(model).items():
        named[layer_name] = dict(layer.named_parameters(remove_duplicate=False))
        for name, parameter in named[layer_name].items():
            inside.add(f"{layer_name}.{name}")
            owner = layer.get_submodule(name.rpartition(".")[0])
            users[_memory_of(parameter)].add((layer_name, id(owner)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in inside:
            users[_memory_of(parameter)].add(("", 0))
    return {
        layer_name: {name for name, parameter in parameters.items() if len(users[_memory_of(parameter)]) > 1}
        for layer_name, parameters in named.items()
    }


def _memory_of(parameter: nn.Parameter) -> object:
    """Returns a key that Parameters share if a change of one changes the other."""
    if parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _has_conv1d(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode without a KV cache, and restores both on exit, even after an error.

    A module that takes the place of another inside the context gets the mode of the one that it replaced.
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
        device: the device to compute on.
        dtype: floating-point weights and arguments are cast to this dtype for the computation, except packed weights.
            The layer's own weights do not change. None computes in the layer's dtype.
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
    ) -> Tensor:
        """Returns the layer's output hidden states, (batch, tokens, hidden), on `device`."""
        return output_hidden(self.run(call.bind(hidden, self._move)))

    @torch.no_grad()
    def observe(
        self,
        call: LayerCall,
        hidden: Tensor,  # (batch, tokens, hidden)
    ) -> list[Tensor]:
        """Returns every floating-point tensor that the layer returns or writes to the state among its arguments."""
        bound = call.bind(hidden, self._move)
        return observed_tensors(bound, self.run(bound))

    @torch.no_grad()
    def run_for_caller(self, call: LayerCall, like: Tensor | None, forward: Callable[..., Any] | None = None) -> Any:
        """Runs the layer and returns its output: tensors on `like`'s device, floating-point ones in `like`'s dtype.

        The layer may write to the state among the call's arguments. A caller that stands in for the layer's forward
        passes the original as `forward`; the layer is then not called as a module, whose hooks already run around the
        caller.
        """
        bound = call.bind(torch.empty(0), self._move, share_state=True)
        output = self.run(bound) if forward is None else self._run_inside(forward, bound)

        def back(leaf: Any) -> Any:
            if like is None or not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device=like.device, dtype=like.dtype if leaf.is_floating_point() else None)

        return map_leaves(output, back, in_place=True)

    def run(self, bound: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Returns the layer's output for bound arguments."""
        args, kwargs = bound
        if self.tensors:
            return torch.func.functional_call(self.layer, self.tensors, args, kwargs, tie_weights=False)
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
        return sent(tensor, self.device, self.dtype if tensor.is_floating_point() else None)


def runner_on(layer: nn.Module, device: torch.device) -> LayerRunner:
    """Returns a runner of a layer that is on `device`, in the dtype that this device multiplies fast in."""
    packed = packed_tensors(layer)
    dtypes = (parameter.dtype for name, parameter in layer.named_parameters() if name not in packed)
    dtype = next(dtypes, torch.float32)
    computed = matmul_dtype(device.type, dtype)
    return LayerRunner(layer, device, None if computed == dtype else computed)


def output_hidden(output: Any) -> Tensor:
    """Returns the hidden states from a decoder layer's output, which is a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def shadowed_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the module's forward by `forward`, and restores it on exit, including accelerate's wrapper."""
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original
