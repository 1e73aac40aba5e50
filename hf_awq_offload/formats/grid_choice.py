"""Chooses the grid of each linear: the recipe's own, changed by the overrides whose pattern matches its name.

    overrides={r"down_proj$": {"bits": 8, "group_size": 64}, r"layers\\.0\\.": {"bits": 8}}

`re.search` looks for a pattern in the module's full name. Where several match, each changes the fields that it names,
in the order of the dict: a later one wins. Pure functions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError
from .name_patterns import fault_in
from .nearest_names import nearest_names

BITS = (2, 3, 4, 8)

GROUP_SIZES = (-1, 32, 64, 128)
"""Group sizes that kernels support; -1 is one group per output row."""


class GridChoice(NamedTuple):
    """A grid as the recipe states it; `group_size` may be -1."""

    bits: int
    group_size: int
    zero_point: bool


SYMMETRIC_BITS = 8
"""From here on a zero point gains nothing that can be noticed (docs/choosing-bits.md), and fewer readers take it."""


class GridFields(NamedTuple):
    """The fields of a recipe from which a linear's grid follows; without `zero_point`, the bits decide."""

    bits: int
    group_size: int
    zero_point: bool | None

    @property
    def choice(self) -> GridChoice:
        zero_point = self.bits < SYMMETRIC_BITS if self.zero_point is None else self.zero_point
        return GridChoice(self.bits, self.group_size, zero_point)


Overrides = Mapping[str, Mapping[str, Any]]


def choice_for(
    name: str,  # of a linear in the model
    base: GridFields,
    overrides: Overrides,
) -> GridChoice:
    """The grid of one linear."""
    for pattern, fields in overrides.items():
        if re.search(pattern, name):
            base = base._replace(**fields)
    return base.choice


def choices(base: GridFields, overrides: Overrides) -> set[GridChoice]:
    """Every grid that a linear may get, whatever its name."""
    reachable = {base}
    for fields in overrides.values():
        reachable |= {choice._replace(**fields) for choice in reachable}
    return {fields.choice for fields in reachable}


def check_choice(where: str, choice: GridFields) -> None:
    """Raises ConfigError unless every field has an allowed value; `where` goes before the field's name."""
    if not _is_one_of(choice.bits, BITS):
        raise ConfigError(f"{where}bits is {choice.bits!r}; pass 4 (the default), 2, 3 or 8.")
    if not _is_one_of(choice.group_size, GROUP_SIZES):
        raise ConfigError(
            f"{where}group_size is {choice.group_size!r}; pass 128 (the default), 64, 32, or -1 for one group per row."
        )
    if not isinstance(choice.zero_point, bool | None):
        raise ConfigError(f"{where}zero_point is {choice.zero_point!r}; pass True, False, or None to go by the bits.")


def checked_overrides(overrides: Any, base: GridFields) -> dict[str, dict[str, Any]]:
    """Checks `overrides` and copies it; None gives an empty dict.

    Raises:
        ConfigError: it is no dict of dicts, a pattern is not a valid regular expression, a field is unknown or a
            value is not allowed.
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides is {overrides!r}; pass a dict of regular expressions, such as {{'down_proj$': {{'bits': 8}}}}."
        )
    for pattern, fields in overrides.items():
        _check_pattern(pattern)
        if not isinstance(fields, Mapping) or not fields:
            raise ConfigError(f"overrides[{pattern!r}] is {fields!r}; pass a dict such as {{'bits': 8}}.")
        for field in fields:
            if field not in GridChoice._fields:
                nearest = difflib.get_close_matches(str(field), GridChoice._fields, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"overrides[{pattern!r}] has no field {field!r}; did you mean {nearest!r}? Known: "
                    f"{', '.join(GridChoice._fields)}."
                )
        check_choice(f"overrides[{pattern!r}]: ", base._replace(**fields))
    return {pattern: dict(fields) for pattern, fields in overrides.items()}


def check_that_all_match(
    overrides: Overrides,
    names: Collection[str],  # of the linears that will be quantized
    left_out: Mapping[str, str],  # name -> why it stays in full precision
) -> None:
    """Raises ConfigError if a pattern matches no linear that will be quantized."""
    for pattern in overrides:
        if any(re.search(pattern, name) for name in names):
            continue
        kept = next((name for name in left_out if re.search(pattern, name)), None)
        if kept is not None:
            raise ConfigError(
                f"overrides[{pattern!r}] changes nothing: what it finds stays in full precision, such as {kept} "
                f"({left_out[kept]}). Correct the pattern or leave it out."
            )
        near = f" Did you mean {' or '.join(nearest_names(pattern, names))}?" if names else ""
        example = f", such as {min(names)}" if names else ""
        raise ConfigError(
            f"overrides[{pattern!r}] matches no linear's name.{near} Names are full ones{example}; correct the "
            "pattern or leave it out."
        )


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(
            f"overrides has the key {pattern!r}; pass regular expressions as non-empty strings, such as 'down_proj$'."
        )
    fault = fault_in(pattern)
    if fault is not None:
        raise ConfigError(
            f"overrides has the key {pattern[:200]!r}, which is not a valid regular expression ({fault}); pass one "
            "such as 'down_proj$', with a backslash before dots and brackets that are meant literally."
        )


def _is_one_of(value: Any, allowed: tuple[int, ...]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in allowed
