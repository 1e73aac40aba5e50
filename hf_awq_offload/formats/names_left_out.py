"""Says in an AWQ config (`modules_to_not_convert`) what is not quantized. Pure functions of module names.

How a reader looks up a linear in the list:

    vLLM, SGLang, TGI, transformers 4   entry in name                                  anywhere, within words too
    transformers 5.17 to 5.20           re.match(entry, name), name.endswith(entry)
    transformers 5.21 to 5.24           the same, but a match has to end where a part of the name ends

A full name without a dot at its end is found by all of these only in names that contain it, so it is safe if no
quantized linear's name contains it. A short name ("gate", "lm_head.0") rarely is; all entries are therefore full
names. They are written as the files have them, which servers map to their own names, and as the model has them, where
that differs.

A full name may still be part of another one: that of a router, "model.layers.1.mlp.gate", is part of
"model.layers.1.mlp.gate_proj". A dot at its end would exclude the longer name, but the router as well, and no other
text is part of the shorter name alone. So a linear whose name contains that of a dense module has to be dense too: see
`clashes`. (compressed-tensors compares whole names and needs no such rule.)

A dot at the end of an entry means everything below a module: "model.visual." is part of
"model.visual.blocks.0.attn.qkv" and of whatever names a server gives to linears that it fuses there. But transformers
5 reads an entry as a regular expression: for it "model.layers.1." stands for "model.layers.10", too. There, smaller
modules are named: "model.layers.1.mlp.".

Sources: `is_layer_skipped` (vLLM, with substrings for AWQ), `is_layer_skipped_awq` (SGLang),
`is_layer_skipped_quantization` (TGI), `replace_with_awq_linear` (transformers 4), `should_convert_module`
(transformers 5).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from .fused_linears import complete_modules
from .name_patterns import ancestors


def entries(
    dense: Mapping[str, str],
    quantized: Mapping[str, str],
    optional: Collection[str] = (),
    chosen: Collection[str] = (),
) -> list[str]:
    """Returns the entries of `modules_to_not_convert`, sorted.

    Args:
        dense: every module that a reader may take for a linear and that is not quantized: name in the model -> in the
            files.
        quantized: the quantized linears, likewise.
        optional: those names of dense modules, of either kind, that are left out of the list where they are part of a
            quantized linear's name.
        chosen: entries that the user wrote; those that no reader finds in a quantized linear's name are kept.
    """
    quantized_names = {*quantized, *quantized.values()}
    taken = _joined([*quantized_names, *complete_modules(quantized_names)])
    in_model, in_files = set(dense), set(dense.values())
    below = _subtrees(in_model, quantized, taken) | _subtrees(in_files, quantized.values(), taken)
    # The files' names are all written out, because servers rename what they know: perhaps not a whole subtree.
    full_names = in_files | {name for name in in_model if not name.startswith(tuple(below))}
    fused = {name for name in complete_modules(in_model | in_files) if not name.startswith(tuple(below))}
    kept = {name for name in full_names if name not in optional or _is_free(name, taken)}
    of_user = {entry for entry in chosen if entry not in taken and re.search(f"^(?:{entry})", taken, re.M) is None}
    return sorted(kept | below | of_user | {name for name in fused if _is_free(name, taken)})


def clashes(dense: Collection[str], quantized: Collection[str]) -> dict[str, str]:
    """Maps linears whose names contain that of a dense module to that module: AWQ readers can't tell them apart."""
    taken = _joined(quantized)
    found: dict[str, str] = {}
    for entry in sorted(dense):
        if entry in taken:
            found |= {name: entry for name in quantized if entry in name}
    return found


def _joined(names: Iterable[str]) -> str:
    """One text that contains what any of the names contains; searching it is much faster than searching each."""
    return "\n".join(names)


def _is_free(entry: str, taken: str) -> bool:
    """Whether no reader finds an entry in one of the joined names: as a part, or as an expression for its start."""
    expression = re.escape(entry).replace(r"\.", ".")
    return entry not in taken and re.search(f"^{expression}", taken, re.MULTILINE) is None


def _subtrees(dense: Collection[str], quantized: Iterable[str], taken: str) -> set[str]:
    """The largest modules that hold two or more dense modules, nothing quantized, and are free; each with a dot."""
    free = {module: False for name in quantized for module in ancestors(name)}
    holds: defaultdict[str, int] = defaultdict(int)
    for name in dense:
        for module in ancestors(name):
            if module not in free:
                free[module] = _is_free(f"{module}.", taken)
            if free[module]:
                holds[f"{module}."] += 1
                break
    return {module for module, count in holds.items() if count > 1}
