"""MXFP4 as gpt-oss has it: experts fused into one parameter, 32 fp4 (E2M1) and a common exponent in each block.

    P_blocks   (experts, out, n, 16) uint8    two fp4 in each byte, the first in the lower half
    P_scales   (experts, out, n)     uint8    e; a value is 2^(e - 127) · q
    P          (experts, in, out)             the parameter, in = 32 n

A fp4 times a power of two is exact in bf16, which has the exponents of fp32, so the result is bf16 and fits every dtype
of a model. Source: transformers' `convert_moe_packed_tensors` (integrations/mxfp4.py), which transposes, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .records import Claims, Recognized, Stored, StoredWeight, contradicts, described
from .scaling import scales_of, unpack_fp4

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # in a block


def claim_mxfp4(stored: Stored, claims: Claims) -> None:
    """Recognizes every pair of blocks and scales.

    Raises:
        CheckpointError: the shapes don't fit, or the scales are missing.
    """
    for name, header in stored.headers.items():
        if not name.endswith(BLOCKS) or header.dtype != "U8":
            continue
        virtual = name.removesuffix(BLOCKS)
        blocks = stored.require(name, name, ["U8"], 4)
        scales = stored.require(virtual + SCALES, name, ["U8"], 3)
        if tuple(scales.shape) != tuple(blocks.shape[:3]) or blocks.shape[3] != BYTES:
            contradicts(
                f"{name} is {described(blocks)}, and {virtual}{SCALES} is {described(scales)}",
                f"(experts, out, n, {BYTES}) and (experts, out, n)",
            )
        experts, rows, groups, _ = blocks.shape
        shape = (experts, 2 * BYTES * groups, rows)
        parts = {"blocks": name, "scales": virtual + SCALES}
        weight = StoredWeight(virtual, parts, shape, torch.bfloat16, _dequantize)
        claims.recognized.append(Recognized(weight, "mxfp4", 4, is_native=True))


def _dequantize(parts: Mapping[str, Tensor]) -> Tensor:
    blocks, scales = parts["blocks"], parts["scales"]
    experts, rows, groups, width = blocks.shape
    weight = torch.empty(experts, groups * 2 * width, rows, dtype=torch.bfloat16)
    for expert in range(experts):
        values = unpack_fp4(blocks[expert])  # (out, n, 32)
        values.mul_(scales_of(scales[expert]).to(torch.bfloat16).unsqueeze(-1))
        weight[expert] = values.flatten(1).t()
    return weight
