"""Finds out whether the names of packed tensors survive transformers' renaming between checkpoint and model.

The rules are regular expressions written for `….weight`. Some are so loose that they rename `….qweight` on saving and
do not restore it on loading. A linear with such a name has to stay in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming


class Renaming:
    """The renaming rules of one model, in both directions.

    Args:
        conversions: what transformers' `get_model_conversion_mapping` returns.
    """

    def __init__(self, conversions: Sequence[Any]):
        reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
        self.on_loading, self.on_saving = list(conversions), reverse

    def keeps(
        self,
        name: str,  # of a linear in the model
        tensors: Sequence[str],  # what the checkpoint holds instead of its `weight`
    ) -> bool:
        """Whether saving and loading rename these tensors of a linear as they rename its `weight`."""
        weight, back = self._there_and_back(f"{name}.weight")
        return all(self._goes_along(f"{name}.{tensor}", tensor, weight, back) for tensor in tensors)

    def name_in_checkpoint(
        self,
        name: str,  # of a module in the model
    ) -> str:
        """The module's name in checkpoints."""
        return _renamed(f"{name}.weight", self.on_saving).removesuffix(".weight")

    def _goes_along(self, key: str, tensor: str, weight: str, back: str) -> bool:
        if _is_converted(key, self.on_saving):
            return False
        saved, loaded = self._there_and_back(key)
        same = (saved, loaded) == (_with_last(weight, tensor), _with_last(back, tensor))
        return (loaded == key or same) and not _is_converted(loaded, self.on_loading)

    def _there_and_back(self, key: str) -> tuple[str, str]:
        saved = _renamed(key, self.on_saving)
        return saved, _renamed(saved, self.on_loading)


def _with_last(key: str, tensor: str) -> str:
    """`key` with its last part replaced by another tensor's name."""
    return f"{key.rpartition('.')[0]}.{tensor}"


def _renamed(key: str, conversions: Sequence[Any]) -> str:
    for conversion in conversions:
        if isinstance(conversion, WeightRenaming):
            key, _ = conversion.rename_source_key(key)
    return key


def _is_converted(key: str, conversions: Sequence[Any]) -> bool:
    converters = [converter for converter in conversions if isinstance(converter, WeightConverter)]
    return any(converter.rename_source_key(key)[1] is not None for converter in converters)
