"""The dtypes that a model can be loaded in, by name; imports no torch, because the command line checks names first."""

from __future__ import annotations

import difflib

USUAL = ("auto", "bfloat16", "float16", "float32")
OTHERS = ("float64", "half", "float", "double")
"""Also known to torch."""


def wrong_dtype(name: str) -> str | None:
    """Returns what to pass instead of a name that is none of a dtype for weights; None if it is one."""
    if name in (*USUAL, *OTHERS):
        return None
    near = difflib.get_close_matches(name.removeprefix("torch."), USUAL, n=1)
    return f"pass one of {', '.join(USUAL)}" + (f" (did you mean {near[0]!r}?)" if near else "")
