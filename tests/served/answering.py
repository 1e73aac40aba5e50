"""What the readers' scripts share; it runs in their environments, and needs torch alone.

Int4 kernels of servers want AVX-512, AMX or CUDA. In their place, products with the dequantized weight, in fp32.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where a word of AWQ has the values of its eight columns."""


def unpacked(words: Tensor, bits: int = 4) -> Tensor:
    """Returns the values of int32 words along the last dimension, lowest bits first."""
    return ((words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32)) & (2**bits - 1)).flatten(-2)


def unpacked_awq(words: Tensor) -> Tensor:
    """Returns the values of AWQ's words, (..., n) -> (..., 8 n)."""
    return unpacked(words).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)


def dequantized(
    codes: Tensor,  # (..., in, out)
    zero_points: Tensor | int,  # (..., groups, out)
    scales: Tensor,  # (..., groups, out)
) -> Tensor:
    """Returns the weight, (..., in, out) fp32."""
    repeats = codes.shape[-2] // scales.shape[-2]
    if isinstance(zero_points, Tensor):
        zero_points = zero_points.repeat_interleave(repeats, -2)
    return (codes - zero_points) * scales.float().repeat_interleave(repeats, -2)


def multiplied(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (in, out)
    bias: Tensor | None,  # (out,)
) -> Tensor:
    """Returns x @ weight + bias in the dtype of x."""
    product = x.float() @ weight
    return (product if bias is None else product + bias.float()).to(x.dtype)


def experts(
    hidden_states: Tensor,  # (tokens, hidden)
    gate_up: Tensor,  # (experts, hidden, 2 · intermediate)
    down: Tensor,  # (experts, intermediate, hidden)
    weights: Tensor,  # (tokens, chosen)
    chosen: Tensor,  # (tokens, chosen)
) -> Tensor:
    """Returns the weighted sum of the chosen experts' outputs, (tokens, hidden)."""
    total = torch.zeros(hidden_states.shape)
    for expert in chosen.unique().tolist():
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[tokens].float() @ gate_up[expert]).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        total.index_add_(0, tokens, (inner @ down[expert]) * weights[tokens, place, None].float())
    return total.to(hidden_states.dtype)


def answer(read: Callable[[Path], dict[str, Any]], about: dict[str, Any]) -> None:
    """Prints a line of JSON for each checkpoint that the command line names: what `read` returned, or its error."""
    for folder in map(Path, sys.argv[1:]):
        try:
            found = read(folder)
        except BaseException as error:  # whatever it is, it is the answer
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps({"kind": folder.name, **about, **found}), flush=True)
