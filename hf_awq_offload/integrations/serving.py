"""Says of a quantized model what its server's operator has to know beforehand."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..config import AwqOffloadConfig
from ..formats import fused_linears
from ..formats.awq import COLUMNS_PER_WORD
from ..formats.tensor_parallel import Shape, advice
from ..logs import get_logger
from ..nn.quantized_linear import QuantizedLinear

logger = get_logger(__name__)


def warn_of_readers(recipe: AwqOffloadConfig, quantized: Collection[str], left_out: Mapping[str, str]) -> None:
    """Warns, before a run starts, of what a common reader will not load although this package does.

    Args:
        recipe: how the linears are quantized.
        quantized: full names of the linears that will be quantized.
        left_out: linear in full precision -> why.
    """
    grids = {name: recipe.choice(name) for name in sorted(quantized)}
    text = fused_linears.advice({**grids, **left_out})
    if text is not None:
        logger.warning(text)
    with_zero_points = [name for name, grid in grids.items() if grid.zero_point]
    if with_zero_points and recipe.checkpoint_format == "compressed-tensors":
        logger.warning(
            f"{len(with_zero_points)} linears get zero points in the compressed-tensors format, such as "
            f"{with_zero_points[0]}. This package loads them; transformers 5.23 and 5.24 with the compressed-tensors "
            "library do not. For these, pass zero_point=False; at fewer than 8 bits that costs accuracy."
        )


def tensor_parallel_advice(model: nn.Module, recipe: AwqOffloadConfig) -> str | None:
    """Says in the log, and returns, over how many devices servers can't split a model quantized with `recipe`.

    None if they can split it over 2, 4 and 8 devices.
    """
    shapes = [
        Shape(name, module.in_features, module.out_features, recipe.choice(name).group_size)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    ]
    text = advice(shapes, COLUMNS_PER_WORD if recipe.checkpoint_format == "awq" else 1)
    if text is not None:
        logger.info(text)
    return text
