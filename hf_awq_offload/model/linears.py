"""Tells which modules are linears: those that compute x Wᵀ + b and nothing else, whatever their class is called."""

from __future__ import annotations

import copy
from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..machine_errors import reraise_of_machine

LEAST_SIDE = 32
"""A parameter may be a matrix if at least two of its dimensions are this large; 32 is the smallest group size."""

PRODUCT_TOLERANCE = 1e-4
"""Largest relative deviation that fp32 rounding may cause between two ways to compute a matrix product."""


def linears_in(layer: nn.Module) -> dict[str, nn.Linear]:
    """Returns every linear inside `layer` by its name there, in the order of definition."""
    return {name: module for name, module in layer.named_modules() if is_linear(module)}


def matrices_outside_linears(layer: nn.Module) -> dict[str, str]:
    """Finds what in `layer` may be multiplied by activations but is not a linear: name -> description.

    The name is that of the module if it holds such parameters and no linear, otherwise that of the parameter.
    """
    described = {}
    for name, module in layer.named_modules():
        known = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
        named = [] if known else list(module.named_parameters(recurse=False))
        matrices = [key for key, value in named if value.ndim >= 2 and sorted(value.shape)[-2] >= LEAST_SIDE]
        if not matrices:
            continue
        kind = getattr(module, "fused_class", type(module)).__name__  # of experts that were taken apart
        if name and not any(isinstance(part, nn.Linear) for part in module.modules()):
            described[name] = f"a {kind}, whose {', '.join(matrices)} are no linears"
        else:
            described |= {f"{name}.{key}".lstrip("."): f"a parameter of a {kind}, no linear" for key in matrices}
    return described


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Returns whether `module` computes x Wᵀ + b: an nn.Linear, or a subclass that computes nothing else."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    known = _PRODUCTS.setdefault(type(module), {})
    shape = (module.in_features, module.out_features, module.bias is not None)
    if shape not in known:
        known[shape] = _computes_product(module)
    return known[shape]


_PRODUCTS: WeakKeyDictionary[type, dict[tuple[int, int, bool], bool]] = WeakKeyDictionary()
"""Subclass of nn.Linear -> (in, out, has bias) -> whether it computes x Wᵀ + b."""


def _computes_product(linear: nn.Linear) -> bool:
    """Compares the module's forward with x Wᵀ + b on random weights."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(linear)
    with torch.device("cpu"), torch.no_grad():
        tensors = {
            name: torch.randn(value.shape, generator=generator)
            for name, value in linear.named_parameters(recurse=False)
        }
        twin._parameters = linear._parameters | {name: nn.Parameter(value) for name, value in tensors.items()}
        x = torch.randn(2, 3, linear.in_features, generator=generator) * 10
        try:
            output = type(linear).forward(twin, x)
        except Exception as error:  # any other error means that it needs another input, so it is not a linear
            reraise_of_machine(error)
            return False
        expected = nn.functional.linear(x, tensors["weight"], tensors.get("bias"))
        if not isinstance(output, Tensor) or output.shape != expected.shape:
            return False
        return bool((output - expected).norm() <= PRODUCT_TOLERANCE * expected.norm())
