"""Makes PEFT work with quantized linears; users need to do nothing.

A quantized linear is an nn.Linear, so all kinds of adapters work on it as on dense ones. Three cases need more:

- LoRA uses our own layer (lora.py), which can be merged;
- a quantized linear in modules_to_save can't be trained, and raises an error that says so;
- for some mixtures of experts, PEFT rewrites configs and checkpoints of adapters from linears per expert to the fused
  parameters of transformers 5. Quantized models hold a linear per expert, so nothing must be rewritten.

PEFT has no public hook for a whole process, so `register` wraps functions that PEFT looks up by name. If a release of
PEFT lacks such a name, the feature that needs it raises (merging: the linear's `weight` refuses).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..errors import ModelStructureError
from ..logs import get_logger
from ..model.expert_names import conversions_without_merging
from ..model.experts import UnfusedExperts
from ..nn.quantized_linear import QuantizedLinear
from ..offload.memory_limit import release_freed

logger = get_logger(__name__)

OFFLOADED = (
    "{name} is offloaded to the CPU or the disk by its device_map. Adapters on offloaded linears can't be trained "
    "(accelerate onloads weights for the forward pass and removes them before the backward pass), and PEFT would load "
    'them to a device without room. Load the whole model onto one device: device_map={{"": 0}} for an accelerator, or '
    'device_map="cpu"; 4-bit weights take a quarter of the memory of 16-bit ones.'
)


def require_onloaded(model: nn.Module) -> None:
    """Raises ModelStructureError if a quantized linear is offloaded: its adapters cannot be trained."""
    for name, linear in model.named_modules():
        if isinstance(linear, QuantizedLinear) and linear.is_offloaded:
            raise ModelStructureError(OFFLOADED.format(name=name))


def register() -> None:
    """Makes PEFT, if it is installed, use `AwqLoraLinear` for quantized linears. Calling it again does nothing."""
    if find_spec("peft") is not None:
        _register()


@cache
def _register() -> None:
    _put_before("peft.tuners.lora.model", "dispatch_awq", _dispatching)
    _put_before("peft.utils.transformers_weight_conversion", "convert_peft_config_for_transformers", _converting)
    _put_before("peft.utils.other", "_set_layer_requires_grad", _training)
    for module_name in ("peft.utils.transformers_weight_conversion", "transformers.integrations.peft"):
        _put_before(module_name, "get_model_conversion_mapping", _mapping)


def _put_before(module_name: str, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    module = import_module(module_name)
    original = getattr(module, name, None)
    if original is None:
        logger.warning(f"This release of PEFT has no {module_name}.{name}; parts of docs/training.md will not work.")
        return
    setattr(module, name, wraps(original)(wrapper(original)))


def _dispatching(dispatch_awq: Callable) -> Callable:
    """Wraps PEFT's choice of a LoRA layer: a quantized linear gets `AwqLoraLinear`."""
    layer_class = import_module(".lora", __package__).AwqLoraLinear

    def dispatch(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> nn.Module | None:
        if not isinstance(target, QuantizedLinear) or kwargs.get("parameter_name") is not None:
            return dispatch_awq(target, adapter_name, *args, **kwargs)
        if target.is_offloaded:
            raise ModelStructureError(OFFLOADED.format(name=kwargs.get("target_name") or "A linear"))
        layer = layer_class(target, adapter_name, *args, **kwargs)
        release_freed()  # PEFT has dequantized the weight and freed it; the C library would keep that memory
        return layer

    return dispatch


def _training(set_requires_grad: Callable) -> Callable:
    """Wraps PEFT's requires_grad: a quantized linear in modules_to_save raises a clearer error than torch's."""

    def refuse_quantized(layer: nn.Module, requires_grad: bool, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, QuantizedLinear):
            layer.requires_grad_(requires_grad)
        return set_requires_grad(layer, requires_grad, *args, **kwargs)

    return refuse_quantized


def _converting(convert: Callable) -> Callable:
    """Wraps PEFT's rewriting of adapter configs: leaves them unchanged if experts are linears."""

    def convert_config(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, UnfusedExperts) for module in model.modules()):
            return convert(peft_config, model, *args, **kwargs)
        return None

    return convert_config


def _mapping(get_mapping: Callable) -> Callable:
    """Wraps the weight conversions: drops those that would fuse experts which are linears."""

    def get_mapping_without_merging(model: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return conversions_without_merging(get_mapping(model, *args, **kwargs), model)

    return get_mapping_without_merging
