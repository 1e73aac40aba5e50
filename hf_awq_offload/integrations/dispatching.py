"""The quantized model goes where the caller's device_map wants it: devices by accelerate's hooks, or the disk."""

from __future__ import annotations

from typing import Any

from accelerate import dispatch_model
from torch import nn

from ..errors import ConfigError
from ..offload.offload_folder import DISK, OffloadFolder
from ..offload.stored_weights import StoredWeights

DeviceMap = dict[str, Any]


def dispatch(model: nn.Module, device_map: DeviceMap) -> None:
    """Put a model that is in RAM where `device_map` says: plainly on one device, by accelerate's hooks on several."""
    devices = set(device_map.values())
    if len(devices) == 1:
        nn.Module.to(model, devices.pop())
    else:
        dispatch_model(model, device_map=device_map, skip_keys=model._skip_keys_device_placement)


def offload_folder_of(weights: StoredWeights | None, device_map: DeviceMap | None) -> OffloadFolder | None:
    """The folder for what `device_map` has on the disk; None if that is nothing.

    Raises:
        ConfigError: the caller named no folder.
    """
    if device_map is None or DISK not in device_map.values():
        return None
    assert weights is not None
    if weights.folder is None:
        raise ConfigError(
            "device_map places modules on disk, but there is no folder for the quantized weights; pass "
            "offload_folder=..., or map them to 'cpu' or an accelerator (max_memory['cpu'] of from_pretrained)."
        )
    return OffloadFolder(weights.folder, device_map)


def dispatch_with_disk(model: nn.Module, weights: StoredWeights, offload: OffloadFolder) -> None:
    """The same for a device_map with modules on the disk; what is on the meta device is read there when it runs.

    Full-precision weights that stay on the disk are read from where `weights` has them.
    """
    model.tie_weights()  # type: ignore[operator]
    named = dict(model.named_parameters(remove_duplicate=False))
    in_ram = {name: value for name, value in named.items() if offload.has(name) and not value.is_meta}
    if in_ram:
        offload.put("rest", in_ram)
    index: dict[str, Any] = dict(offload.index)
    twins = {id(parameter): name for name, parameter in named.items() if name in weights.index}
    for name, parameter in named.items():
        if parameter.is_meta and name not in index:
            index[name] = weights.index[name if name in weights.index else twins[id(parameter)]]
    dispatch_model(
        model,
        device_map=dict(offload.device_map),
        offload_dir=offload.folder,
        offload_index=index,
        skip_keys=model._skip_keys_device_placement,
    )
