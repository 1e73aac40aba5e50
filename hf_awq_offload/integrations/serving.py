"""Says of a quantized model what its server's operator has to know beforehand."""

from __future__ import annotations

from torch import nn

from ..config import AwqOffloadConfig
from ..formats.awq import COLUMNS_PER_WORD
from ..formats.tensor_parallel import Shape, advice
from ..logs import get_logger
from ..nn.quantized_linear import QuantizedLinear

logger = get_logger(__name__)


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
