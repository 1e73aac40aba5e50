"""Reads the weights of a model on the meta device from the disk when they are needed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.safetensors import TensorPlace, tensor_places
from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import StoredTensor, files_of, read
from ..errors import CheckpointError
from ..model.experts import UnfusedExperts, fused_names, unfused

Tensors = dict[str, Tensor]


class StoredWeights:
    """Reads parameters by name, when asked for.

    Args:
        index: name in the model -> {"safetensors_file", "weight_name"}, as transformers makes it for accelerate.
        dtypes: name in the model -> the dtype that the model wants it in.
        folder: the `offload_folder` that the caller gave transformers.
        source: the checkpoint; a tensor that is in none of its files was written by transformers meanwhile.
    """

    def __init__(
        self,
        index: Mapping[str, Mapping[str, str]],
        dtypes: Mapping[str, torch.dtype],
        folder: str | os.PathLike[str] | None = None,
        source: Source | None = None,
    ):
        self.index = index
        self.folder = None if folder is None else Path(folder)
        files: dict[Path, Mapping[str, StoredTensor]] = dict(source.by_file) if source is not None else {}
        self.places: dict[str, StoredTensor] = {}
        for name, entry in index.items():
            file = Path(entry["safetensors_file"])
            if file not in files:
                files[file] = tensor_places(file)
            self.places[name] = files[file][entry["weight_name"]]
        self.dtypes = dict(dtypes)
        self.fused: dict[str, tuple[nn.Module, UnfusedExperts]] = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights, each once."""
        return list(dict.fromkeys(file for place in self.places.values() for file in files_of(place)))

    def take_experts_apart(self, model: nn.Module, fused: Mapping[str, nn.Module]) -> None:
        """Reads experts one by one from here on, where the checkpoint holds them fused.

        Args:
            model: holds `UnfusedExperts` where the fused modules were.
            fused: name in the model -> the module that was there.
        """
        for name, module in fused.items():
            experts = model.get_submodule(name)
            assert isinstance(experts, UnfusedExperts)
            if f"{name}.{fused_names(module)[-1]}" in self.places:
                self.fused[name] = (module, experts)

    def is_as_stored(self, name: str) -> bool:
        """Whether `read` returns the very bytes that are in the file."""
        if not isinstance(self.places[name], TensorPlace):
            return False
        dtype = self.places[name].torch_dtype
        return not dtype.is_floating_point or self.dtypes.get(name, dtype) == dtype

    def read(self, name: str, pin_memory: bool = False) -> Tensor:
        """Returns one parameter on the CPU, in the model's dtype.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        if name not in self.places:
            raise CheckpointError(
                f"The checkpoint holds no {name}; expected every weight of the model. Download it again."
            )
        tensor = read(self.places[name], pin_memory)
        wanted = self.dtypes.get(name, tensor.dtype)
        return tensor.to(wanted) if tensor.is_floating_point() else tensor

    def of(self, module_name: str, module: nn.Module, pin_memory: bool = False) -> Tensors:
        """Returns all parameters of a module, by their names within it."""
        tensors: Tensors = {}
        for name, (original, experts) in self.fused.items():
            if name == module_name or name.startswith(f"{module_name}."):
                within = name[len(module_name) + 1 :]
                tensors |= {_joined(within, key): value for key, value in self._apart(name, original, experts).items()}
        for name, _ in module.named_parameters(remove_duplicate=False):
            if name not in tensors:
                tensors[name] = self.read(_joined(module_name, name), pin_memory)
        return tensors

    def _apart(self, name: str, original: nn.Module, experts: UnfusedExperts) -> Tensors:
        loaded = copy.copy(original)
        loaded._parameters = {
            key: nn.Parameter(self.read(f"{name}.{key}"), requires_grad=False) for key in original._parameters
        }
        return {key: value.detach() for key, value in unfused(loaded, experts.projections).named_parameters()}


class ReadAhead:
    """Calls `read(name)`, and meanwhile has another thread read what comes next.

    Returns what `read` returns, whatever is asked for; only the wait is shorter.
    """

    def __init__(self, read: Callable[[str], Any], order: Sequence[str]):
        self.read = read
        self.next = dict(pairwise(order))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._coming: tuple[str, Future[Any]] | None = None

    def take(self, name: str) -> Any:
        """Returns what `read(name)` returns; starts reading the name that follows."""
        coming, self._coming = self._coming, None
        value = coming[1].result() if coming is not None and coming[0] == name else None
        if value is None:
            value = self.read(name)
        if name in self.next:
            self._coming = self.next[name], self._pool.submit(self.read, self.next[name])
        return value

    def close(self) -> None:
        """Drops what was read ahead."""
        self._coming = None
        self._pool.shutdown(wait=True, cancel_futures=True)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
