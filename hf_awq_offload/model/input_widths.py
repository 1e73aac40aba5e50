"""Tells from shapes alone how many distinct inputs the linears of a decoder layer read, and how wide these are.

Linears of one module that read the same width share an input, unless one of them leads back to the width that the
module takes in. Such a linear closes the module, and reads what was computed inside: o_proj beside a q_proj of the
same shape, or the dense layer after a fused qkv. gate_proj and up_proj lead elsewhere, so they share one input. Inputs
that are none of the module's own may be two. Where shapes leave it open, the answer is rather too many than too few.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import nn

from .experts import expert_parts
from .linears import linears_in

MOST_SHARED = 2
"""Linears of one module and one width have at most so many inputs: q, k and v share one, o has another."""


def readers_by_width(layer: nn.Module) -> dict[tuple[str, int], list[nn.Linear]]:
    """Returns linears outside experts by (module, width of their input), in the order of definition.

    The module is "" in a layer whose parts all read the output of one norm.
    """
    parts = expert_parts(layer)
    linears = {name: linear for name, linear in linears_in(layer).items() if name not in parts}
    are_parallel = _norms_in(layer, linears.values()) == 1  # none has a weight: nothing is known
    readers: dict[tuple[str, int], list[nn.Linear]] = defaultdict(list)
    for name, linear in linears.items():
        readers["" if are_parallel else name.rpartition(".")[0], linear.in_features].append(linear)
    return dict(readers)


def input_widths(layer: nn.Module) -> list[int]:
    """Returns the width of each distinct input of linears outside experts."""
    readers = readers_by_width(layer)
    taken_in: dict[str, int] = {}
    for module, width in readers:
        taken_in.setdefault(module, width)
    return [
        width
        for (module, width), linears in readers.items()
        for _ in range(_inputs_of(linears, is_taken_in=width == taken_in[module]))
    ]


def expert_input_widths(layer: nn.Module) -> list[int]:
    """Returns the width of each input of every expert that is taken apart: each sees tokens of its own."""
    linears = linears_in(layer)
    inputs = {(part.expert_name, linears[name].in_features) for name, part in expert_parts(layer).items()}
    return [width for _, width in sorted(inputs)]


def _inputs_of(linears: list[nn.Linear], is_taken_in: bool) -> int:
    """Returns how many distinct inputs linears of one module and width have."""
    if is_taken_in and not any(linear.out_features == linear.in_features for linear in linears):
        return 1
    return min(len(linears), MOST_SHARED)


def _norms_in(layer: nn.Module, linears: Iterable[nn.Linear]) -> int:
    """Returns how many norms are as wide as most inputs are; norms of heads and inside an MLP have other widths."""
    counts = Counter(linear.in_features for linear in linears)
    hidden = max(counts, key=counts.__getitem__, default=0)
    parameters = ((name, parameter) for name, parameter in layer.named_parameters() if parameter.ndim == 1)
    return sum(parameter.numel() == hidden and "bias" not in name for name, parameter in parameters)
