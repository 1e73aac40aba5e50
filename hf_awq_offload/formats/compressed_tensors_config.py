"""The quantization config of a compressed-tensors checkpoint: which linear is on which grid."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..errors import CheckpointError
from .fused_linears import complete_modules, looked_up
from .grid_choice import GridChoice
from .layouts import COMPRESSED_TENSORS
from .name_patterns import PREFIX, exact, fault_in, matches, pattern_of_choice, patterns_for

PACK_QUANTIZED = "pack-quantized"
LINEAR = "Linear"
"""The target for every linear that no name or pattern of another group matches."""
LAYOUT_VERSION = "0.18.0"
"""The first release of compressed-tensors that has this layout at every number of bits (pack_quantized.py)."""
META_ATTRIBUTE = "quantization_meta"
"""Field of config.json for how the checkpoint was made; the standard has no place for that."""


@dataclass(kw_only=True)
class PackedCheckpointConfig(QuantizationConfigMixin):
    """The quantization config of a checkpoint of packed weights: the standard's fields and no others."""

    grids: dict[str, GridChoice] = field(default_factory=dict)
    """Target -> grid. A target is a module's name, a pattern after "re:", or a class's name; matched in this order."""
    ignore: list[str] = field(default_factory=list)
    """Names and patterns of modules that are not quantized."""
    quant_method: QuantizationMethod = QuantizationMethod.COMPRESSED_TENSORS

    @classmethod
    def of_linears(
        cls,
        grids: Mapping[str, GridChoice],  # of every quantized linear
        ignored: Collection[str],  # names of all other modules that readers may take for linears
        chosen: Collection[str] = (),  # what the user wrote in modules_to_not_convert
    ) -> PackedCheckpointConfig:
        """The config of a model: the commonest grid is the default, linears on the other grids are named.

        Fused linears are named as servers look them up, too (fused_linears.py). A pattern of the user's is kept in the
        standard's form, for linears whose names only a server knows, unless that matches a quantized linear.
        """
        default = Counter(grids.values()).most_common(1)[0][0]
        targets: dict[str, GridChoice] = {LINEAR: default}
        known = _with_fused({**dict.fromkeys(ignored), **grids})
        named = {name: grid for name, grid in known.items() if grid is not None}
        experts = {name for name in named.keys() - grids.keys() if name.endswith(".experts")}
        for grid in sorted(set(grids.values()) - {default}):
            # The model may have a module with the name of all experts; that is no linear, so it can't be a target.
            own = {name for name, other in named.items() if other == grid and name not in experts}
            targets |= dict.fromkeys(patterns_for(own, named.keys() - own), grid)
        dense = patterns_for(known.keys() - named.keys(), named.keys())
        everything = "\n".join(named).lower()
        ignore = [exact(entry) if entry.lower() in everything else entry for entry in dense]
        of_user = [pattern_of_choice(entry) for entry in chosen]
        kept = [entry for entry in of_user if not any(matches(entry, name) for name in named)]
        return cls(grids=targets, ignore=[*ignore, *sorted({*kept} - {*ignore})])

    def choice_for(
        self,
        names: Collection[str],  # of one module: in the model, and in the checkpoint where that is another
        module: nn.Module,
    ) -> GridChoice | None:
        """The grid of a module, or None if it is not quantized."""
        if any(matches(pattern, name) for pattern in self.ignore for name in names):
            return None
        classes = {base.__name__ for base in type(module).__mro__}
        named = [target for target in self.grids if any(matches(target, name) for name in names)]
        of_class = [target for target in self.grids if target in classes]
        # Names before patterns, as compressed-tensors sorts them.
        targets = sorted(named, key=lambda target: (target not in names, target)) + sorted(of_class)
        return self.grids[targets[0]] if targets else None

    @property
    def layout(self) -> str:
        """The checkpoint format (formats/layouts.py)."""
        return COMPRESSED_TENSORS

    def leave_out(self, names: list[str]) -> None:
        """Takes linears that are dense by now out of the quantized ones."""
        added = [name for name in names if not any(matches(pattern, name) for pattern in self.ignore)]
        self.ignore = [*self.ignore, *added]

    def to_dict(self) -> dict[str, Any]:
        """The standard's fields."""
        groups: dict[str, Any] = {}
        for grid in dict.fromkeys(self.grids.values()):
            groups[f"group_{len(groups)}"] = {
                "targets": [target for target, other in self.grids.items() if other == grid],
                "weights": _weights_of(grid),
                "input_activations": None,
                "output_activations": None,
                "format": PACK_QUANTIZED,
            }
        return {
            "quant_method": self.quant_method.value,
            "format": PACK_QUANTIZED,
            "quantization_status": "compressed",
            "version": LAYOUT_VERSION,
            "config_groups": groups,
            "ignore": copy.copy(self.ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    @property
    def is_asymmetric(self) -> bool:
        """Whether any linear has zero points."""
        return any(grid.zero_point for grid in self.grids.values())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Parses the entry in config.json.

        Raises:
            CheckpointError: this package can't load such a checkpoint.
        """
        if not isinstance(config_dict, Mapping):
            raise _unsupported(f"it is a {type(config_dict).__name__}", "a dict")
        grids: dict[str, GridChoice] = {}
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config_dict.get(key):
                raise _unsupported(f"{key} is {config_dict[key]!r}", "none")
        status = config_dict.get("quantization_status", "compressed")
        if status != "compressed":
            raise _unsupported(f"quantization_status is {status!r}", "'compressed'")
        config_groups = config_dict.get("config_groups") or {}
        if not isinstance(config_groups, Mapping):
            raise _unsupported(f"config_groups is {config_groups!r}", "a dict of groups")
        for name, group in config_groups.items():
            if not isinstance(group, Mapping):
                raise _unsupported(f"config_groups[{name!r}] is {group!r}", "a dict with targets and weights")
            layout = group.get("format") or config_dict.get("format")
            if layout != PACK_QUANTIZED:
                raise _unsupported(f"the format of {name} is {layout!r}", repr(PACK_QUANTIZED))
            for key in ("input_activations", "output_activations"):
                if group.get(key):
                    raise _unsupported(f"{name} has {key}", "quantized weights only")
            targets = _patterns(f"the targets of {name}", group.get("targets"))
            grids |= dict.fromkeys(targets, _grid_of(name, group.get("weights")))
        if not grids:
            raise _unsupported("config_groups names no target", "at least one")
        config = cls(grids=grids, ignore=_patterns("ignore", config_dict.get("ignore")))
        return (config, kwargs) if return_unused_kwargs else config


def _with_fused(known: Mapping[str, GridChoice | None]) -> dict[str, GridChoice | None]:
    """`known` (name -> grid, None if dense) and the names under which servers look up what they fuse."""
    added: dict[str, GridChoice | None] = {}
    for whole, parts in complete_modules(known).items():
        treatments = {known[part] for part in parts}
        if len(treatments) == 1:
            added |= dict.fromkeys([whole, *looked_up(whole, parts)], *treatments)
    return {**added, **known}


def _weights_of(grid: GridChoice) -> dict[str, Any]:
    """The standard's description of a grid."""
    is_channel = grid.group_size == -1
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": not grid.zero_point,
        "strategy": "channel" if is_channel else "group",
        "group_size": None if is_channel else grid.group_size,
        "dynamic": False,
    }


def _grid_of(group: str, weights: Any) -> GridChoice:
    """The grid that the standard's description stands for."""
    if not isinstance(weights, Mapping):
        raise _unsupported(f"the weights of {group} are {weights!r}", "a dict with num_bits, type and strategy")
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    group_size = weights.get("group_size")
    if strategy is None:
        strategy = "channel" if group_size == -1 else "group"
    if kind not in ("int", None) or type(bits) is not int or not 2 <= bits <= 8:
        raise _unsupported(f"the weights of {group} are {bits!r} bits of type {kind!r}", "2 to 8 bits of type 'int'")
    if weights.get("dynamic") or weights.get("actorder") == "group":
        raise _unsupported(f"the weights of {group} are dynamic or in an order of their own", "static, in order")
    if strategy == "channel":
        group_size = -1
    elif strategy != "group" or type(group_size) is not int or group_size < 1:
        raise _unsupported(
            f"{group} has the strategy {strategy!r} and group_size {group_size!r}", "'group' or 'channel'"
        )
    return GridChoice(bits, group_size, not weights.get("symmetric", True))


def _patterns(where: str, entries: Any) -> list[str]:
    """Names and patterns in a list of their own."""
    if not isinstance(entries or [], list | tuple) or not all(isinstance(entry, str) for entry in entries or ()):
        raise _unsupported(f"{where} is {entries!r}", "a list of names and patterns")
    for entry in entries or ():
        fault = fault_in(entry.removeprefix(PREFIX)) if entry.startswith(PREFIX) else None
        if fault is not None:
            raise _unsupported(
                f"{where} has {entry[:200]!r}, which is not a valid regular expression ({fault})", "names"
            )
    return list(entries or ())


def _unsupported(found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint's quantization_config is not one that this package loads: {found}; expected {expected}. "
        "Install compressed-tensors and leave loading to transformers, or correct config.json."
    )


def may_be_taken_for_a_linear(module: nn.Module) -> bool:
    """Whether readers may take a module for a linear, because it holds a matrix `weight`.

    Some routers do without being an `nn.Linear`.
    """
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
