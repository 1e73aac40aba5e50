"""Collects the modules in full precision, which each format's config names in its own way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..formats import names_left_out
from ..formats.compressed_tensors_config import may_be_taken_for_a_linear
from .renaming import Renaming


@dataclass(frozen=True)
class DenseModules:
    """The modules of a model that hold matrices. Dicts map names in the model to names in the files."""

    dense: Mapping[str, str]
    """Modules in full precision that a reader may take for a linear: linears, routers, the output embedding."""
    others: Mapping[str, str]
    """Modules in full precision that hold matrices in another way: fused experts, convolutions."""
    quantized: Mapping[str, str]
    head: frozenset[str]
    """Names of the output embedding, which AWQ readers leave in full precision by themselves."""

    def awq_entries(self, chosen: Collection[str] = ()) -> list[str]:
        """`modules_to_not_convert` of an AWQ config; `chosen` is what the user wrote there."""
        return names_left_out.entries({**self.dense, **self._others_apart}, self.quantized, self.head, chosen)

    @property
    def full_names(self) -> set[str]:
        """Names for `ignore` of compressed-tensors, which compares whole names."""
        named = {**self.dense, **self._others_apart}
        return {*named, *named.values()}

    @property
    def clashes(self) -> dict[str, str]:
        """Quantized linear, by its name in the model -> the dense module that AWQ readers can't tell it from."""
        model_name = {stored: name for name, stored in self.quantized.items()}
        required = {name: stored for name, stored in self.dense.items() if name not in self.head}
        in_files = names_left_out.clashes(set(required.values()), model_name)
        in_model = names_left_out.clashes(set(required), self.quantized)
        return {model_name[stored]: entry for stored, entry in in_files.items()} | in_model

    @property
    def _others_apart(self) -> dict[str, str]:
        """Those of `others` that hold no quantized linear: a reader would take their names for all that they hold."""
        names = {*self.others, *self.others.values()}
        holding = set(names_left_out.clashes(names, {*self.quantized, *self.quantized.values()}).values())
        return {name: stored for name, stored in self.others.items() if not {name, stored} & holding}


def dense_modules(
    model: PreTrainedModel,
    renaming: Renaming,
    is_quantized: Callable[[str, nn.Module], bool],  # of a module, by its name in the model
) -> DenseModules:
    """Collects the modules of a model whose weights may be on the meta device."""
    dense: dict[str, str] = {}
    others: dict[str, str] = {}
    quantized: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name or not _holds_a_matrix(module):
            continue
        in_full_precision = dense if may_be_taken_for_a_linear(module) else others
        kind = quantized if is_quantized(name, module) else in_full_precision
        kind[name] = renaming.name_in_checkpoint(name)
    head = {name for name, module in model.named_modules() if name and module is model.get_output_embeddings()}
    return DenseModules(dense, others, quantized, frozenset(head | {dense[name] for name in head & dense.keys()}))


def _holds_a_matrix(module: nn.Module) -> bool:
    parameters = module._parameters.values()
    return not isinstance(module, nn.Embedding) and any(value is not None and value.ndim > 1 for value in parameters)
