"""Stores the quantized layers that the caller's device_map keeps on disk, in one file each, for accelerate's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.durable import remove_link
from ..errors import StorageError

DISK = "disk"


class OffloadFolder:
    """The caller's `offload_folder`, for the modules that `device_map` puts on disk.

    Args:
        folder: the folder, which is created if it does not exist.
        device_map: module name -> device, as in `from_pretrained`.
        in_ram: a module that is no part of the model that is returned, wherever `device_map` has its surroundings.
    """

    def __init__(self, folder: Path, device_map: Mapping[str, Any], in_ram: str | None = None):
        self.folder = folder
        self.in_ram = in_ram
        self.device_map = device_map
        self.index: dict[str, dict[str, str]] = {}
        """Parameter -> its file and name there, in the form of accelerate's `offload_index`."""

    def has(self, name: str) -> bool:
        """Returns whether a parameter, or an entire module, belongs on disk."""
        if self.in_ram is not None and f"{name}.".startswith(f"{self.in_ram}."):
            return False
        inside = [device for module, device in self.device_map.items() if module.startswith(f"{name}.")]
        parts = name.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        nearest = next((self.device_map[module] for module in above if module in self.device_map), None)
        return all(device == DISK for device in inside) if inside else nearest == DISK

    def put(self, file_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors to one file, under their names in the model.

        Raises:
            StorageError: the file could not be written.
        """
        file = self.folder / f"{file_name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_link(file)
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"Quantized weights could not be written to the offload_folder {self.folder}: {error}. Make room, or "
                "name another folder."
            ) from error
        self.index |= {name: {"safetensors_file": str(file), "weight_name": name} for name in tensors}
