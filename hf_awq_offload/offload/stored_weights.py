"""Reads the weights of a model on the meta device from the disk when they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.file_states import FileStates
from ..checkpoint.safetensors import TensorPlace, tensor_places
from ..checkpoint.source import Source
from ..checkpoint.stored_tensor import StoredTensor, files_of, read
from ..errors import CheckpointError
from ..machine_errors import is_out_of_memory
from ..model.experts import UnfusedExperts

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
        self._states = FileStates() if source is None else source.states
        files: dict[Path, Mapping[str, StoredTensor]] = dict(source.by_file) if source is not None else {}
        self.places: dict[str, StoredTensor] = {}
        for name, entry in index.items():
            file = Path(entry["safetensors_file"])
            if file not in files:
                files[file] = tensor_places(file)
            self.places[name] = files[file][entry["weight_name"]]
        self.dtypes = dict(dtypes)
        self.fused: dict[str, UnfusedExperts] = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights, each once."""
        return list(dict.fromkeys(file for place in self.places.values() for file in files_of(place)))

    def take_experts_apart(self, model: nn.Module, names: Iterable[str]) -> None:
        """Reads experts one by one from here on, where the checkpoint holds them fused.

        Args:
            model: holds `UnfusedExperts` where the fused modules were.
            names: those of the modules in the model.
        """
        for name in names:
            experts = model.get_submodule(name)
            assert isinstance(experts, UnfusedExperts)
            if f"{name}.{experts.was_fused[-1]}" in self.places:
                self.fused[name] = experts

    def is_as_stored(self, name: str) -> bool:
        """Whether `read` returns the very bytes that are in the file."""
        if not isinstance(self.places[name], TensorPlace):
            return False
        dtype = self.places[name].torch_dtype
        return not dtype.is_floating_point or self.dtypes.get(name, dtype) == dtype

    def read(self, name: str, pin_memory: bool = False) -> Tensor:
        """Returns one parameter on the CPU, in the model's dtype.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or its file has been changed since it was opened.
        """
        if name not in self.places:
            raise CheckpointError(
                f"The checkpoint holds no {name}; expected every weight of the model. Download it again."
            )
        try:
            tensor = self._read_unchanged(self.places[name], pin_memory)
        except Exception as error:  # the system limits pinned memory, too
            if not pin_memory or not is_out_of_memory(error):
                raise
            tensor = self._read_unchanged(self.places[name], pin_memory=False)
        wanted = self.dtypes.get(name, tensor.dtype)
        return tensor.to(wanted) if tensor.is_floating_point() else tensor

    def _read_unchanged(self, stored: StoredTensor, pin_memory: bool) -> Tensor:
        """Reads a tensor; checks afterwards that its files are still those whose headers say where it is."""
        try:
            tensor = read(stored, pin_memory)
        except (OSError, CheckpointError):
            self._states.require_unchanged(files_of(stored))  # says more, if that is why
            raise
        self._states.require_unchanged(files_of(stored))
        return tensor

    def of(self, module_name: str, module: nn.Module, pin_memory: bool = False) -> Tensors:
        """Returns all parameters of a module, by their names within it."""
        tensors: Tensors = {}
        for name, experts in self.fused.items():
            if name == module_name or name.startswith(f"{module_name}."):
                within = name[len(module_name) + 1 :]
                fused = {key: self.read(f"{name}.{key}") for key in experts.was_fused}
                tensors |= {_joined(within, key): value for key, value in experts.taken_apart(fused).items()}
        for name, _ in module.named_parameters(remove_duplicate=False):
            if name not in tensors:
                tensors[name] = self.read(_joined(module_name, name), pin_memory)
        return tensors


class ReadAhead:
    """Calls `read(name)`, and meanwhile has another thread read what comes next.

    Returns what `read` returns, whatever is asked for; only the wait is shorter. What there was no memory to read ahead
    is read when it is asked for.
    """

    def __init__(self, read: Callable[[str], Any], order: Sequence[str]):
        self.read = read
        self.next = dict(pairwise(order))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._coming: tuple[str, Future[Any]] | None = None

    def take(self, name: str) -> Any:
        """Returns what `read(name)` returns; starts reading the name that follows."""
        coming, self._coming = self._coming, None
        value = self._finished(coming[1]) if coming is not None and coming[0] == name else None
        if value is None:
            value = self.read(name)
        if name in self.next:
            self._coming = self.next[name], self._pool.submit(self.read, self.next[name])
        return value

    def stop(self) -> bool:
        """Drops what was read ahead, and reads nothing ahead any more; returns whether it would have."""
        coming, self._coming = self._coming, None
        will_read = coming is not None or bool(self.next)
        if coming is not None and not coming[1].cancel():
            wait([coming[1]])
        self.next = {}
        return will_read

    def _finished(self, coming: Future[Any]) -> Any:
        """Returns what was read ahead; None if memory ran out meanwhile."""
        try:
            return coming.result()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds what was read
            return None

    def close(self) -> None:
        """Drops what was read ahead."""
        self._coming = None
        self._pool.shutdown(wait=True, cancel_futures=True)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
