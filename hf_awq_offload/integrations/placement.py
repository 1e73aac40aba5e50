"""Where full-precision weights are while a model is quantized, and where the quantized model goes at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.source import Source
from ..config import AwqOffloadConfig
from ..pipeline.run_storage import chosen_offload
from .dispatching import DeviceMap


class Placement:
    """Answers transformers' questions about the device map while it loads a model that is to be quantized.

    Args:
        recipe: says where full-precision weights may be.
    """

    def __init__(self, recipe: AwqOffloadConfig):
        self._recipe = recipe
        self.final_device_map: DeviceMap | None = None
        """Where the caller wants the quantized model."""
        self.files: list[Path] = []
        """Files of the checkpoint that hold tensors."""
        self.source: Source | None = None
        self.offload = "cpu"
        """ "cpu" or "disk": where the full-precision weights are."""

    def loading_map(self, device_map: Any) -> Any:
        """Returns the map to load with, and keeps the caller's for the quantized model.

        A name such as "auto" is returned as it is: transformers resolves it for the quantized sizes, then calls
        `redirect`.
        """
        if isinstance(device_map, str):
            return device_map
        if device_map is not None:
            self.final_device_map = dict(device_map)
        return {"": "disk" if self._recipe.offload == "disk" or self._result_on_disk else "cpu"}

    def redirect(self, device_map: DeviceMap) -> None:
        """Keeps a map that transformers has resolved, and changes it in place to the one to load with."""
        if self.final_device_map is None:
            self.final_device_map = dict(device_map)
            self.offload = self._chosen()
            device_map.clear()
            device_map[""] = self.offload

    def choose(self, device_map: Any, checkpoint_files: Sequence[str] | None, source: Source | None) -> None:
        """Chooses RAM or disk for the checkpoint's weights; transformers loads by `device_map`, changed in place.

        `source` is the opened checkpoint; None if its files are in another format than safetensors.

        Raises:
            ConfigError: the disk is asked for, but the files cannot be read lazily.
        """
        self.files, self.source = [Path(file) for file in checkpoint_files or ()], source
        self.offload = self._chosen()
        if isinstance(device_map, dict):
            device_map[""] = self.offload

    @property
    def is_lazy(self) -> bool:
        """Whether full-precision weights stay on the disk."""
        return self.offload == "disk"

    def _chosen(self) -> str:
        size_bytes = None if self.source is None else self.source.dequantized_bytes
        return chosen_offload(self._recipe, self.files, self._result_on_disk, size_bytes)

    @property
    def _result_on_disk(self) -> bool:
        return "disk" in (self.final_device_map or {}).values()
