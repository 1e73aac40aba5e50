"""Brings one decoder layer at a time to the execution device with accelerate's hooks; the rest is in RAM or on disk.

    offload="cpu"    the model is in RAM; a layer goes to the device and comes back
    offload="disk"   the model is on the meta device; a layer is read from the checkpoint's own files and released again

Meanwhile the next layer is prefetched: a thread reads it, and on a CUDA device copies it from pinned memory on a stream
of its own. That only shortens the wait. The results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model.decoder_layers import LayerRunner, candidate_layers, runner_on, shadowed_forward
from ..transfers import pinned
from .stored_weights import ReadAhead, StoredWeights, Tensors

ALIGNMENT_BYTES = 64
"""torch aligns what it allocates on a CPU to this many bytes."""


@contextmanager
def onloaded(layer: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Yields the layer on the device; on exit it returns to the CPU, after an error as well.

    Modules that were put into the layer meanwhile go to the CPU with it.
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
    """Copies each parameter that does not start at a multiple of ALIGNMENT_BYTES.

    Parameters that transformers has mapped from a file start anywhere. Some kernels sum in an order that depends on
    it, so that a layer read from the disk would differ in the last bit from the same layer in RAM.
    """
    for parameter in module.parameters():
        if parameter.data_ptr() % ALIGNMENT_BYTES:
            parameter.data = parameter.data.clone()


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hook that accelerate has put on `old`, if any (models on several devices have them)."""
    if hasattr(old, "_hf_hook"):
        add_hook_to_module(new, old._hf_hook)


class Fate(Enum):
    """What becomes of a module's tensors when it leaves the device."""

    RESTORE = auto()
    """The module is on the meta device again, as it was."""
    KEEP = auto()
    """The module goes to RAM as it is now."""
    RELEASE = auto()
    """The module as it is now goes to the meta device: only shapes and dtypes are left."""


@dataclass
class FilledModule:
    """A module that `filled` has given its tensors; decides what becomes of them."""

    module: nn.Module
    fate: Fate = Fate.RESTORE

    def keep(self) -> None:
        """Lets the module go to RAM when it leaves the device."""
        self.fate = Fate.KEEP

    def release(self) -> None:
        """Frees the module's memory when it leaves the device."""
        self.fate = Fate.RELEASE


@contextmanager
def filled(
    module: nn.Module,  # its parameters on the meta device
    tensors: Tensors,  # by names within the module
    device: torch.device,
) -> Iterator[FilledModule]:
    """Puts `tensors` into the module, on the device; on exit the module meets the fate that was chosen meanwhile."""
    parameters = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    filled_module = FilledModule(module)
    try:
        # accelerate's AlignDevicesHook would empty the accelerator's cache after every tensor, and wait for it.
        for name, value in tensors.items():
            owner, _, key = name.rpartition(".")
            part = module.get_submodule(owner)
            part._parameters[key] = _on_device(part._parameters[key], value, device)
        tensors.clear()
        for part, name, buffer in buffers:
            part._buffers[name] = buffer.to(device)
        _tie(module, parameters)
        yield filled_module
    finally:
        match filled_module.fate:
            case Fate.RESTORE:
                for part, name, parameter in parameters:
                    part._parameters[name] = parameter  # the very objects, so that shared parameters stay shared
                for part, name, buffer in buffers:
                    part._buffers[name] = buffer
            case Fate.KEEP:
                module.to("cpu")
            case Fate.RELEASE:
                to_meta(module)


def _on_device(parameter: nn.Parameter | None, value: Tensor, device: torch.device) -> nn.Parameter:
    """Returns the parameter's value on the device, in its dtype."""
    assert parameter is not None
    moved = value.to(device, parameter.dtype)
    if moved.shape != parameter.shape:
        raise CheckpointError(
            f"A stored weight has the shape {tuple(moved.shape)}; expected {tuple(parameter.shape)}. The checkpoint's "
            "config.json does not fit its files."
        )
    return nn.Parameter(moved, parameter.requires_grad)


def _tie(module: nn.Module, parameters: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Gives both owners of a shared parameter its tensor; accelerate fills only one of them."""
    filled_with: dict[int, nn.Parameter] = {}
    for part, name, parameter in parameters:
        now = part._parameters[name]
        assert now is not None
        if not now.is_meta:
            filled_with[id(parameter)] = now
    for part, name, parameter in parameters:
        part._parameters[name] = filled_with.get(id(parameter), part._parameters[name])


class Onloader:
    """Brings the decoder layers of a model to the execution device, one at a time.

    Args:
        model: on the CPU, or on the meta device if `weights` is given.
        device: the execution device.
        weights: the stored weights of a model on the meta device.
        prefetch: read the next layer while one is at work.
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
        self._filled: dict[str, FilledModule] = {}
        self._in_ram: set[str] = set()
        self._released: set[str] = set()
        self._outputs: dict[type, Any] = {}

    def expect(self, names: Sequence[str]) -> None:
        """Says which layers come next, in this order, so that they can be prefetched."""
        self._ahead.close()
        self._ahead = ReadAhead(self._read, names if self.prefetch else ())

    def stop_reading_ahead(self) -> bool:
        """Frees what was prefetched, and prefetches nothing any more; returns whether it would have."""
        self.prefetch = False
        return self._ahead.stop()

    def close(self) -> None:
        """Drops what was prefetched."""
        self._ahead.close()

    @contextmanager
    def onloaded(self, name: str) -> Iterator[nn.Module]:
        """Yields the decoder layer on the device; on exit it returns to where it was.

        `keep` and `release`, called inside, let it go to RAM or nowhere instead.
        """
        layer = self.model.get_submodule(name)
        if self.weights is None or name in self._in_ram:
            if self._staging is not None and self.prefetch:
                _put(layer, self._ahead.take(name), self._staging)
            with onloaded(layer, self.device):
                yield layer
            return
        try:
            with filled(layer, self._take(name), self.device) as self._filled[name]:
                yield layer
        finally:
            self._filled.pop(name, None)

    def run_layer(self, name: str, use: Callable[[LayerRunner], Any]) -> Any:
        """Returns what `use` returns for a runner of the layer, which is on the device meanwhile."""
        with self.onloaded(name) as layer:
            return use(runner_on(layer, self.device))

    def keep(self, name: str) -> None:
        """Lets this layer, which is onloaded, stay in RAM from here on."""
        if self.weights is not None:
            self._in_ram.add(name)
            self._filled[name].keep()

    def mark_in_ram(self, name: str) -> None:
        """Notes that this layer's weights were put into the model: it need not be read."""
        self._in_ram.add(name)

    def release(self, name: str) -> None:
        """Frees the memory of this layer, which is onloaded, once it leaves the device."""
        if self.weights is not None:
            self._released.add(name)
            self._filled[name].release()

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Reads a layer on the meta device to the CPU whenever the model itself runs it inside the context.

        The skeleton pass does so once for each class of layer. A released layer returns what its class returned before.
        """

        def running(layer: nn.Module, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not any(parameter.is_meta for parameter in layer.parameters()):
                    return forward(*args, **kwargs)
                assert self.weights is not None
                if name not in self._released:
                    with filled(layer, self.weights.of(name, layer), torch.device("cpu")):
                        self._outputs[type(layer)] = forward(*args, **kwargs)
                return self._outputs[type(layer)]

            return run

        with ExitStack() as stack:
            for name, layer in candidate_layers(self.model).items() if self.weights is not None else ():
                stack.enter_context(shadowed_forward(layer, running(layer, name, layer.forward)))
            yield

    @contextmanager
    def non_layer_weights_loaded(self) -> Iterator[None]:
        """Keeps what the model runs beside its decoder layers in RAM: embeddings and norms, without the head."""
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

    def load_remaining(self, except_for: Callable[[str], bool] = lambda name: False) -> None:
        """Reads all parameters that are still on the meta device into RAM, except those that `except_for` names."""
        if self.weights is None:
            return
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not except_for(name):
                set_module_tensor_to_device(self.model, name, "cpu", value=self.weights.read(name))
        self.model.tie_weights(recompute_mapping=False)  # type: ignore[operator]

    def _take(self, name: str) -> Tensors:
        tensors, ready = self._ahead.take(name)
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return dict(tensors)

    def _read(self, name: str) -> tuple[Tensors, Any]:
        """Returns a layer's weights and, if they are copied to the device meanwhile, the event that ends the copy."""
        layer = self.model.get_submodule(name)
        staging = self._staging if self.prefetch else None  # its memory serves no other stream
        if self.weights is None:
            tensors = {key: parameter.detach() for key, parameter in layer.named_parameters()}
        else:
            tensors = self.weights.of(name, layer, pin_memory=staging is not None)
        if staging is None:
            return tensors, None
        with torch.cuda.stream(staging):
            from_pinned = {key: pinned(value) for key, value in tensors.items()}
            copies = {key: value.to(self.device, non_blocking=True) for key, value in from_pinned.items()}
            ready = torch.cuda.Event()
            ready.record(staging)
        ready.synchronize()  # in the reading thread: pinned memory must live until it was copied
        return copies, ready


def _put(layer: nn.Module, staged: tuple[Tensors, Any], stream: torch.cuda.Stream) -> None:
    """Gives the parameters of a layer in RAM their copies on the device; the Parameter objects stay the same."""
    tensors, ready = staged
    current = torch.cuda.current_stream(stream.device)
    current.wait_event(ready)
    for name, parameter in layer.named_parameters():
        tensors[name].record_stream(current)
        parameter.data = tensors[name]


def to_meta(module: nn.Module) -> None:
    """Replaces every parameter by one on the meta device, of the same shape and dtype."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
