"""Which linears servers fuse into one module, by their names, and what this asks of a recipe. Pure functions.

    q_proj, k_proj, v_proj                           ->  qkv_proj
    gate_proj, up_proj                               ->  gate_up_proj
    experts.0.gate_proj, experts.0.up_proj, …,
    experts.1.gate_proj, …: all experts of a layer   ->  experts

A fused module is on one grid, or in full precision as a whole. How servers find out which:

    vLLM      `ignore`, modules_to_not_convert: the parts are looked up, and have to agree
              targets: the fused name, else the class ("Linear" is part of all names of classes), else the parts; so
              a grid that is not that of the target "Linear" is found under the fused name only
              experts: looks up gate_proj, up_proj and down_proj of expert 0, however the files call them
    SGLang    the same; releases that do not know which parts a model fuses look up the fused name only

Sources: `should_ignore_layer`, `find_matched_target`, `CompressedTensorsMoEMethod.get_moe_method`, `is_layer_skipped`
and each model's `packed_modules_mapping` (vLLM), the functions of the same names in SGLang.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from ..messages import shortened
from .grid_choice import GridChoice
from .name_patterns import NUMBER

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linears that servers fuse, by the name of the fused one. Some look up that name, others the names of its parts."""
WHOLE_OF = {part: whole for whole, parts in FUSED.items() for part in parts}

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.[^.]+")
"""A linear of one expert, by its full name."""
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")

State = GridChoice | str
"""A linear's grid, or why it is in full precision."""

MOST_KINDS = 4


def fused_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """Maps modules that servers have to those of the linears `names` which they hold; at least two each."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        module, _, last = name.rpartition(".")
        if expert := EXPERT.fullmatch(name):
            members[expert["experts"]].append(name)
        elif module and last in WHOLE_OF:
            members[f"{module}.{WHOLE_OF[last]}"].append(name)
    return {whole: parts for whole, parts in members.items() if len(parts) > 1}


def complete_modules(names: Collection[str]) -> dict[str, list[str]]:
    """Like `fused_modules`, without those that lack a part: servers then keep the others apart."""
    return {
        whole: parts
        for whole, parts in fused_modules(names).items()
        if {part.rpartition(".")[2] for part in parts} >= {*FUSED.get(whole.rpartition(".")[2], ())}
    }


def looked_up(whole: str, parts: Iterable[str]) -> list[str]:
    """Names that servers look up for the linears of a fused module, other than its own name and theirs."""
    experts = {match["number"] for part in parts if (match := EXPERT.fullmatch(part))}
    return [f"{whole}.{number}.{linear}" for number in sorted(experts, key=int) for linear in EXPERT_LINEARS]


def conflicts(states: Mapping[str, State]) -> dict[str, dict[str, State]]:
    """Maps fused modules whose linears differ to their linears: not on one grid, or only some in full precision."""
    found = {whole: {part: states[part] for part in parts} for whole, parts in fused_modules(states).items()}
    return {whole: parts for whole, parts in found.items() if len({_treatment(state) for state in parts.values()}) > 1}


def advice(states: Mapping[str, State]) -> str | None:
    """Says which linears servers want treated alike, and how to write that; None if there is nothing to say.

    Args:
        states: every linear of the decoder layers.
    """
    by_kind: defaultdict[str, list[tuple[str, dict[str, State]]]] = defaultdict(list)
    for whole, parts in conflicts(states).items():
        by_kind[NUMBER.sub("*", whole)].append((whole, parts))
    if not by_kind:
        return None
    shown = [_described(*cases[0], len(cases) - 1) for cases in list(by_kind.values())[:MOST_KINDS]]
    more = f"; and {len(by_kind) - MOST_KINDS} more kinds" if len(by_kind) > MOST_KINDS else ""
    remedies = dict.fromkeys(_remedy(*case) for cases in by_kind.values() for case in cases)
    return (
        "vLLM and SGLang fuse linears into one module, which has one grid or is in full precision as a whole, and "
        f"will not load what this recipe makes (this package does): {'; '.join(shown)}{more}. For these servers, let "
        f"every pattern match all linears of such a module or none: {', '.join(list(remedies)[:MOST_KINDS])}."
    )


def _treatment(state: State) -> GridChoice | None:
    return state if isinstance(state, GridChoice) else None


def _described(whole: str, parts: Mapping[str, State], others: int) -> str:
    by_state: defaultdict[State, list[str]] = defaultdict(list)
    for name, state in parts.items():
        by_state[state].append(name.removeprefix(f"{whole.rpartition('.')[0]}."))
    shown = [f"{shortened(names, 3)} {_text(state)}" for state, names in by_state.items()]
    like_it = f" (and {others} more)" if others else ""
    return f"{whole}{like_it} has {', '.join(shown)}"


def _text(state: State) -> str:
    if isinstance(state, str):
        return f"in full precision ({state})"
    size = "whole rows" if state.group_size == -1 else f"groups of {state.group_size}"
    return f"at {state.bits} bits in {size}, {'asymmetric' if state.zero_point else 'symmetric'}"


def _remedy(whole: str, parts: Mapping[str, State]) -> str:
    last = whole.rpartition(".")[2]
    together = FUSED.get(last)
    if any(isinstance(state, str) for state in parts.values()):
        names = list(together) if together else [r".*\.experts\."]
        return f"modules_to_not_convert={names}"
    pattern = rf"({'|'.join(together)})$" if together else r"\.experts\."
    return f'overrides={{r"{pattern}": …}}'
