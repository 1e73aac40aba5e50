"""The smallest Triton kernel: all that a launch needs has to work for it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def trial_kernel(target, VALUE: tl.constexpr):
    """Writes VALUE to `target` (1,)."""
    tl.store(target, VALUE)
