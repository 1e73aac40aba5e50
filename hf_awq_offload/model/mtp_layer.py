"""A decoder layer for multi-token prediction (MTP), which transformers leaves out, within the model for a while.

Letters: B sequences, T tokens, H hidden size.

The checkpoint of a model with MTP holds a decoder layer like the model's own, and a stem that makes its input from the
next token and from what the model gives to its head (DeepSeek-V3 report, arXiv:2412.19437, section 2.2):

    input_t = P [norm_e(embedding of token t+1) ; norm_h(output_t)]      P: (H, 2H), embeddings first

The layer stands in the model under its name in the checkpoint while it is loaded and quantized, so that it is treated
like every other layer. The model's own forward pass never runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.stored_tensor import StoredTensor, read


@dataclass(frozen=True)
class StemTensors:
    """The tensors of a stem in the checkpoint."""

    projection: StoredTensor  # (H, 2H)
    bias: StoredTensor | None  # (H,)
    embedding_norm: StoredTensor  # (H,)
    hidden_norm: StoredTensor  # (H,)
    embeddings: StoredTensor | None
    """(vocabulary, H); None: those of the model."""


@dataclass(frozen=True)
class MtpLayer:
    """A decoder layer for multi-token prediction that stands in a model."""

    name: str
    """Its name in the model."""
    twin: str
    """The model's own decoder layer that it is a copy of."""
    stem: StemTensors
    stored: Mapping[str, StoredTensor]
    """The layer's tensors by their names in the checkpoint."""
    undo: list[Callable[[], None]] = field(default_factory=list)
    """Steps that take it out of the model."""

    def remove(self) -> None:
        """Takes the layer out of the model, which is then what it was before."""
        while self.undo:
            self.undo.pop()()


class Stem(nn.Module):
    """Computes the inputs of an MTP layer."""

    def __init__(self, embedding_norm: nn.Module, hidden_norm: nn.Module, projection: nn.Linear):
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.projection = embedding_norm, hidden_norm, projection

    def forward(
        self,
        hidden: Tensor,  # (B, T, H), what the model gives to its head
        embeddings: Tensor,  # (B, T, H), of the tokens that follow
    ) -> Tensor:
        """Returns the inputs, (B, T, H)."""
        return self.projection(torch.cat([self.embedding_norm(embeddings), self.hidden_norm(hidden)], dim=-1))


def norm_of(layer: nn.Module, hidden_size: int) -> nn.Module | None:
    """Returns one of the norms that a decoder layer applies to its hidden states; None if it has several kinds of them.

    Norms differ in what they do with their weight: some multiply by w, others by 1 + w.
    """
    norms = [
        module
        for module in layer.children()
        if [(name, tuple(value.shape)) for name, value in module.named_parameters()] == [("weight", (hidden_size,))]
    ]
    return norms[0] if len({type(norm) for norm in norms}) == 1 else None


def read_stem(tensors: StemTensors, layer: nn.Module) -> Stem:
    """Reads a stem into memory, in the dtype of the layer's norms; `layer` need not be loaded."""
    hidden_size, width = tensors.projection.shape
    norm = norm_of(layer, hidden_size)
    assert norm is not None
    dtype = norm.get_parameter("weight").dtype

    def filled_norm(stored: StoredTensor) -> nn.Module:
        filled = copy.deepcopy(norm)
        filled._parameters["weight"] = _parameter(stored, dtype)
        return filled

    projection = nn.Linear(width, hidden_size, bias=tensors.bias is not None, device="meta")
    projection.weight = _parameter(tensors.projection, dtype)
    if tensors.bias is not None:
        projection.bias = _parameter(tensors.bias, dtype)
    return Stem(filled_norm(tensors.embedding_norm), filled_norm(tensors.hidden_norm), projection)


def _parameter(stored: StoredTensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(read(stored).to(dtype), requires_grad=False)


def add_copy(model: nn.Module, twin: str, name: str) -> list[Callable[[], None]]:
    """Adds a copy of the decoder layer `twin` to the model; returns the steps that take it out again, last one first.

    Modules on the way to `name` are made where there are none. A copy in one of the model's own lists is hidden while
    the module that owns the list runs.

    Raises:
        ValueError: there is no room for it: the name is taken, or does not lead to a list.
    """
    *path, last = name.split(".")
    undo: list[Callable[[], None]] = []
    owner = parent = model
    is_new = False
    for position, part in enumerate(path, start=1):
        owner, is_new = parent, part not in parent._modules
        if is_new:
            parent.add_module(part, nn.ModuleList() if position == len(path) else nn.Module())
            undo.append(_removal(parent, part))
        parent = parent.get_submodule(part)
    if not isinstance(parent, nn.ModuleList) or last in parent._modules:
        for step in reversed(undo):
            step()
        raise ValueError(f"{type(model).__name__} has no list with room for {name}")
    layer = _copy_of(model.get_submodule(twin))
    parent.add_module(last, layer)
    undo.append(_removal(parent, last))
    if not is_new:
        undo += _hiding(owner, parent, last, layer)
    return undo


def _removal(parent: nn.Module, name: str) -> Callable[[], None]:
    def remove() -> None:
        parent._modules.pop(name, None)

    return remove


def _copy_of(layer: nn.Module) -> nn.Module:
    """Copies a decoder layer, but not the config that it shares with the model."""
    configs = [config for module in layer.modules() if (config := getattr(module, "config", None)) is not None]
    return copy.deepcopy(layer, {id(config): config for config in configs})


def _hiding(owner: nn.Module, layers: nn.Module, key: str, layer: nn.Module) -> list[Callable[[], None]]:
    """Takes a layer out of a list whenever the list's owner runs, as many models run all layers of a list.

    Several forward passes can be under way at once, each of them waiting somewhere in the list.
    """
    under_way = 0

    def hide(*_: Any) -> None:
        nonlocal under_way
        under_way += 1
        layers._modules.pop(key, None)

    def show(*_: Any) -> None:
        nonlocal under_way
        under_way -= 1
        if not under_way:
            layers._modules[key] = layer

    handles = (owner.register_forward_pre_hook(hide), owner.register_forward_hook(show, always_call=True))
    return [handle.remove for handle in handles]
