"""Where quantized layers stay that the caller's device_map leaves on the disk: a file each, which accelerate's hooks
read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import StorageError

DISK = "disk"


class OffloadFolder:
    """The caller's `offload_folder`, for the modules that `device_map` has on the disk.

    Args:
        folder: made if it is not there.
        device_map: module name -> device, as `from_pretrained` takes it.
    """

    def __init__(self, folder: Path, device_map: Mapping[str, Any]):
        self.folder = folder
        self.device_map = device_map
        self.index: dict[str, dict[str, str]] = {}
        """Parameter -> where it lies, as accelerate's `offload_index`."""

    def has(self, name: str) -> bool:
        """Whether a parameter, or all of a module, belongs on the disk."""
        inside = [device for module, device in self.device_map.items() if module.startswith(f"{name}.")]
        parts = name.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        nearest = next((self.device_map[module] for module in above if module in self.device_map), None)
        return all(device == DISK for device in inside) if inside else nearest == DISK

    def put(self, file_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, under their names in the model, to a file of their own.

        Raises:
            StorageError: that fails.
        """
        file = self.folder / f"{file_name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"Quantized weights can't be written to the offload_folder {self.folder}: {error}. Make room, or name "
                "another folder."
            ) from error
        self.index |= {name: {"safetensors_file": str(file), "weight_name": name} for name in tensors}
