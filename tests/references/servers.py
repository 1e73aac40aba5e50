"""States how servers find out from a compressed-tensors config how a module is quantized, written from what they do.

vLLM 0.32 and SGLang 0.5.23 (`should_ignore_layer`, `find_matched_target`, `get_moe_method`). A server asks for its own
modules, into which it has fused linears of the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .readers_of_config import PARTS


class NotServableError(Exception):
    """The server stops: parts of one module are quantized differently."""


@dataclass(frozen=True)
class Server:
    """How one release looks things up."""

    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Fused module -> its parts, where the server knows them."""
    within_names: bool = False
    """Whether an entry of `ignore` without "re:" is looked for anywhere in a name, in upper and lower case."""

    def weights_of_linear(
        self, config: Mapping[str, Any], name: str, class_name: str = "ColumnParallelLinear"
    ) -> dict[str, Any] | None:
        """The entry "weights" that applies to a module, None if it is in full precision."""
        if self._is_ignored(name, config["ignore"]):
            return None
        groups = config["config_groups"].values()
        weights = {target: group["weights"] for group in groups for target in group["targets"]}
        return weights[self._target(name, class_name, weights)]

    def weights_of_experts(self, config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """The same for all experts of a layer: it asks for three linears of the first."""
        if self.within_names and self._is_named(name, config["ignore"]):  # SGLang looks up their own name first
            return None
        linears = [f"{name}.0.{part}_proj" for part in ("gate", "up", "down")]
        first, *others = (self.weights_of_linear(config, linear, "FusedMoELinear") for linear in linears)
        if any(other != first for other in others):
            raise NotServableError(f"projections of {name} are quantized differently")
        return first

    def _is_ignored(self, name: str, ignore: Sequence[str]) -> bool:
        answers = {self._is_named(part, ignore) for part in ([name] if name in ignore else self._parts_of(name))}
        if len(answers) > 1:
            raise NotServableError(f"some parts of {name} are in full precision")
        return answers.pop()

    def _is_named(self, name: str, ignore: Iterable[str]) -> bool:
        return any(
            _matches(entry, name) or (self.within_names and entry.lower() in name.lower() and entry[:3] != "re:")
            for entry in ignore
        )

    def _target(self, name: str, class_name: str, targets: Iterable[str]) -> str:
        """Its name first, then its class, and only then its parts."""
        for target in targets:
            if _matches(target, name):
                return target
        for target in targets:
            if target.lower() in class_name.lower():
                return target
        found = [next((target for target in targets if _matches(target, part)), None) for part in self._parts_of(name)]
        if None in found:
            raise NotServableError(f"no target for {name}")
        return str(found[0])

    def _parts_of(self, name: str) -> list[str]:
        module, _, last = name.rpartition(".")
        return [f"{module}.{part}" for part in self.parts[last]] if last in self.parts else [name]


def _matches(entry: str, name: str) -> bool:
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


SERVERS = {
    "vLLM": Server(PARTS),
    "SGLang": Server(PARTS, within_names=True),
    "SGLang, parts unknown": Server(within_names=True),  # the model's class does not say what it fuses
}
