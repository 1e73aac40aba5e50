"""One decoder layer at a time on the execution device, moved by accelerate's hooks; the rest in RAM or on the disk.

    offload="cpu"    the model is in RAM; a layer goes to the device and comes back
    offload="disk"   the model is on the meta device; a layer is read from the checkpoint's own files, and let go of

On a CUDA device the layer that comes next is copied meanwhile, from pinned memory on a stream of its own; from the
disk, a thread reads it. Both only shorten the waiting: what is computed is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from ..model.decoder_layers import candidate_layers, shadowed_forward
from .stored_weights import ReadAhead, StoredWeights, Tensors

ALIGNMENT_BYTES = 64
"""Of what torch allocates on a CPU."""


@contextmanager
def onloaded(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`layer` on `device` inside the context, back on the CPU after it, whatever happens inside.

    Modules that are put into `layer` inside the context travel back with it.
    """
    had_own_forward = "forward" in vars(layer)
    _, handle = cpu_offload_with_hook(layer, device)
    try:
        handle.hook.pre_forward(layer)
        if device.type == "cpu":
            _align(layer)
        yield layer
    finally:
        handle.offload()
        handle.remove()
        if not had_own_forward:
            vars(layer).pop("forward", None)  # accelerate puts the class's method back as an instance attribute


def _align(module: nn.Module) -> None:
    """Have every parameter begin where torch's allocator would let it begin.

    Those that transformers has mapped from a file begin anywhere. The order of sums in some kernels depends on that,
    and the same layer read from the disk would differ from it in the last bit.
    """
    for parameter in module.parameters():
        if parameter.data_ptr() % ALIGNMENT_BYTES:
            parameter.data = parameter.data.clone()


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Where accelerate has put a hook on `old` (a model on several devices), give it to `new` as well."""
    if hasattr(old, "_hf_hook"):
        add_hook_to_module(new, old._hf_hook)


@contextmanager
def filled(
    module: nn.Module,  # its parameters on the meta device
    tensors: Tensors,  # by names within the module
    device: torch.device,
) -> Iterator[list[Callable[[], None]]]:
    """`module` with `tensors` for parameters, on `device`; afterwards it is as it was, on the meta device.

    What is put into the list that is given runs at the end instead of that.
    """
    parameters = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=tensors, place_submodules=True)
    instead: list[Callable[[], None]] = []
    try:
        hook.init_hook(module)
        hook.pre_forward(module)
        tensors.clear()
        _tie(module, parameters)
        yield instead
    finally:
        if instead:
            for step in instead:
                step()
        else:
            for part, name, parameter in parameters:
                part._parameters[name] = parameter  # the very objects, so that shared parameters stay shared
            for part, name, buffer in buffers:
                part._buffers[name] = buffer


def _tie(module: nn.Module, parameters: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """accelerate fills a parameter that two modules share once; let both have it."""
    filled_with: dict[int, nn.Parameter] = {}
    for part, name, parameter in parameters:
        now = part._parameters[name]
        assert now is not None
        if not now.is_meta:
            filled_with[id(parameter)] = now
    for part, name, parameter in parameters:
        part._parameters[name] = filled_with.get(id(parameter), part._parameters[name])


class Onloader:
    """Has one decoder layer at a time on the execution device.

    Args:
        model: on the CPU, or, with `weights`, on the meta device.
        device: the execution device.
        weights: where the weights of a model on the meta device are.
        prefetch: read the layer that comes next while one is at work.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, weights: StoredWeights | None = None, prefetch: bool = True
    ):
        self.model = model
        self.device = device
        self.weights = weights
        self.prefetch = prefetch
        self._staging = torch.cuda.Stream(device) if device.type == "cuda" and prefetch else None
        self._ahead = ReadAhead(self._read, ())
        self._in_ram: set[str] = set()
        self._gone: set[str] = set()
        self._outputs: dict[type, Any] = {}

    def expect(self, names: Sequence[str]) -> None:
        """The layers that come next, in their order."""
        self._ahead.close()
        self._ahead = ReadAhead(self._read, names if self.prefetch else ())

    def close(self) -> None:
        """Let go of what was read ahead."""
        self._ahead.close()

    @contextmanager
    def onloaded(self, name: str) -> Iterator[nn.Module]:
        """The decoder layer `name` on the device inside; then where it was, unless `keep` or `let_go` was called."""
        layer = self.model.get_submodule(name)
        if self.weights is None or name in self._in_ram:
            if self._staging is not None:
                _put(layer, self._ahead.take(name), self._staging)
            with onloaded(layer, self.device):
                yield layer
            return
        with filled(layer, self._take(name), self.device) as self._instead:
            yield layer

    def keep(self, name: str) -> None:
        """From now on have this layer, which is onloaded, in RAM."""
        if self.weights is None:
            return
        self._in_ram.add(name)
        layer = self.model.get_submodule(name)
        self._instead.append(partial(_to_cpu, layer))

    def is_in_ram(self, name: str) -> None:
        """This layer's weights were put into the model."""
        self._in_ram.add(name)

    def let_go(self, name: str) -> None:
        """Free what this layer, which is onloaded, holds, whatever became of it."""
        if self.weights is not None:
            self._gone.add(name)
            self._instead.append(partial(to_meta, self.model.get_submodule(name)))

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Inside, a layer on the meta device that the model itself runs (the skeleton pass does, once for each kind of
        layer) is read for that, on the CPU."""

        def running(layer: nn.Module, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not any(parameter.is_meta for parameter in layer.parameters()):
                    return forward(*args, **kwargs)
                assert self.weights is not None
                if name not in self._gone:
                    with filled(layer, self.weights.of(name, layer), torch.device("cpu")):
                        self._outputs[type(layer)] = forward(*args, **kwargs)
                return self._outputs[type(layer)]  # of a layer that is gone, what it looked like

            return run

        with ExitStack() as stack:
            for name, layer in candidate_layers(self.model).items() if self.weights is not None else ():
                stack.enter_context(shadowed_forward(layer, running(layer, name, layer.forward)))
            yield

    @contextmanager
    def rest(self) -> Iterator[None]:
        """What the model runs beside its decoder layers, in RAM: the embeddings, final norms; the head not."""
        if self.weights is None:
            yield
            return
        layers = candidate_layers(self.model)
        decoder = getattr(self.model, "base_model", self.model)
        inside = {id(part) for layer in layers.values() for part in layer.modules()}
        names = {id(part): name for name, part in self.model.named_modules()}
        originals = []
        try:
            for part in decoder.modules():
                for key, parameter in part._parameters.items():
                    if id(part) not in inside and parameter is not None and parameter.is_meta:
                        originals.append((part, key, parameter))
                        name = f"{names[id(part)]}.{key}".lstrip(".")
                        set_module_tensor_to_device(part, key, "cpu", value=self.weights.read(name))
            yield
        finally:
            for part, key, parameter in originals:
                part._parameters[key] = parameter

    def load_rest(self, stays: Callable[[str], bool] = lambda name: False) -> None:
        """Read everything that is still on the meta device, to stay in RAM, but for parameters that `stays` names."""
        if self.weights is None:
            return
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not stays(name):
                set_module_tensor_to_device(self.model, name, "cpu", value=self.weights.read(name))
        self.model.tie_weights()  # type: ignore[operator]

    def _take(self, name: str) -> Tensors:
        tensors, ready = self._ahead.take(name)
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return dict(tensors)

    def _read(self, name: str) -> tuple[Tensors, Any]:
        """A layer's weights, on the device if they can be copied beside its work, and what says that they are there."""
        layer = self.model.get_submodule(name)
        if self.weights is None:
            tensors = {key: parameter.detach() for key, parameter in layer.named_parameters()}
        else:
            tensors = self.weights.of(name, layer, pin_memory=self._staging is not None)
        if self._staging is None:
            return tensors, None
        with torch.cuda.stream(self._staging):
            pinned = {key: value if value.is_pinned() else value.pin_memory() for key, value in tensors.items()}
            copies = {key: value.to(self.device, non_blocking=True) for key, value in pinned.items()}
            ready = torch.cuda.Event()
            ready.record(self._staging)
        ready.synchronize()  # in the reading thread: pinned memory must live until it was copied
        return copies, ready


def _put(layer: nn.Module, staged: tuple[Tensors, Any], stream: torch.cuda.Stream) -> None:
    """Let the parameters of a layer in RAM have their copies on the device; the objects stay the same."""
    tensors, ready = staged
    current = torch.cuda.current_stream(stream.device)
    current.wait_event(ready)
    for name, parameter in layer.named_parameters():
        tensors[name].record_stream(current)
        parameter.data = tensors[name]


def _to_cpu(module: nn.Module) -> None:
    module.to("cpu")


def to_meta(module: nn.Module) -> None:
    """Let go of every parameter; shapes and dtypes stay."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
