"""Puts the quantized model where the caller's device_map says: on devices, by accelerate's hooks, or on disk."""

from __future__ import annotations

from typing import Any

from accelerate import dispatch_model
from torch import nn

from ..checkpoint.safetensors import TensorPlace
from ..errors import ConfigError
from ..logs import without_offload_message
from ..offload.offload_folder import DISK, OffloadFolder
from ..offload.stored_weights import StoredWeights

DeviceMap = dict[str, Any]


def dispatch(model: nn.Module, device_map: DeviceMap) -> None:
    """Moves a model from RAM to where `device_map` says; accelerate's hooks serve maps with several devices."""
    devices = set(device_map.values())
    if len(devices) == 1:
        nn.Module.to(model, devices.pop())
    else:
        with without_offload_message():
            dispatch_model(model, device_map=device_map, skip_keys=model._skip_keys_device_placement)


def offload_folder_of(
    weights: StoredWeights | None, device_map: DeviceMap | None, in_ram: str | None = None
) -> OffloadFolder | None:
    """Returns the folder for the modules that `device_map` places on disk, or None if there are none.

    The module `in_ram` is not among them: the model loses it before it is dispatched.

    Raises:
        ConfigError: modules go to disk, but the caller named no folder.
    """
    if device_map is None or DISK not in device_map.values():
        return None
    assert weights is not None
    if weights.folder is None:
        raise ConfigError(
            "device_map places modules on disk, but there is no folder for the quantized weights; pass "
            "offload_folder=..., or keep the modules in memory (device_map, or max_memory['cpu'] of from_pretrained)."
        )
    return OffloadFolder(weights.folder, device_map, in_ram)


def dispatch_with_disk(model: nn.Module, weights: StoredWeights, offload: OffloadFolder) -> None:
    """Dispatches a model whose device_map has modules on disk; their weights are read when the modules run.

    Full-precision weights on the meta device are read from the source files that `weights` points to.
    """
    model.tie_weights(recompute_mapping=False)  # type: ignore[operator]
    named = dict(model.named_parameters(remove_duplicate=False))
    in_ram = {name: value for name, value in named.items() if offload.has(name) and not value.is_meta}
    if in_ram:
        offload.put("rest", in_ram)
    twins = {id(parameter): name for name, parameter in named.items() if name in weights.index}
    for name, parameter in named.items():
        if parameter.is_meta and name not in offload.index:
            stored = name if name in weights.index else twins[id(parameter)]
            if isinstance(weights.places[stored], TensorPlace):
                offload.index[name] = dict(weights.index[stored])
            else:  # accelerate's hooks read files, and this one is dequantized
                offload.put(f"dequantized-{name}", {name: weights.read(stored)})
    with without_offload_message():
        dispatch_model(
            model,
            device_map=dict(offload.device_map),
            offload_dir=offload.folder,
            offload_index=offload.index,
            skip_keys=model._skip_keys_device_placement,
        )
