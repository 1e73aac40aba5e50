"""`model.dequantize()`: plain linears replace the quantized ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..nn.quantized_linear import QuantizedLinear
from ..offload.onloader import move_hook


def dequantize_linears(model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> None:
    """Replaces every quantized linear by a plain one with the same weight, on the same device.

    Args:
        model: quantized; all of it in memory.
        dtype: of the weights, or its name as saving leaves it in a config; by default that of each linear.

    Raises:
        ConfigError: a linear is offloaded.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    offloaded = next((name for name, linear in linears.items() if linear.is_on_meta), None)
    if offloaded is not None:
        raise ConfigError(
            f"{offloaded} is offloaded to the CPU or the disk. Load the model with a device_map without offload, "
            'such as "cpu", to dequantize it.'
        )
    wanted: Any = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, linear in linears.items():
        dense = linear.to_dense(wanted or linear.dtype)
        move_hook(linear, dense)
        model.set_submodule(name, dense)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
