"""PEFT's LoRA layer on a quantized linear: merging makes it dense, unmerging restores the 4-bit linear.

    merge:    base (4 bits)  ->  dense = dequantized base + ΔW, in the model's dtype
    unmerge:  dense  ->  the original base, bit for bit

Rejected: rounding W + ΔW to the base's grid. W lies on the grid, and LoRA mostly adds less than half a step to it, so
rounding to nearest gives W again and the adapter is lost (docs/log.md has the figures). To quantize the merged model on
calibration data, use `quantize_model`.
"""

from __future__ import annotations

from typing import cast

from peft.tuners.lora.layer import Linear
from torch import Tensor

from ..logs import get_logger
from ..nn.quantized_linear import QuantizedLinear
from ..offload.onloader import move_hook

logger = get_logger(__name__)


class AwqLoraLinear(Linear):
    """LoRA, DoRA and similar adapters on a quantized linear."""

    _set_aside: tuple[QuantizedLinear, ...] = ()
    """The quantized base while merged; in a tuple, so that torch does not register it as a submodule."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges the adapters into a dense linear in the model's dtype."""
        base = self.base_layer
        if not isinstance(base, QuantizedLinear):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        dense = base.to_dense(base.dtype).requires_grad_(False)
        if dense.bias is not None:
            dense.bias.data = dense.bias.data.clone()  # merging may add to it
        move_hook(base, dense)
        self.base_layer = dense
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            if self.merged:
                self._set_aside = (base,)
            else:
                self.base_layer = base
        if self.merged:
            logger.warning_once(
                f"Adapters are merged into dense linears in {base.dtype}, several times as large as quantized ones: "
                "rounding the sums to few bits without data would lose most of what was learned. To quantize the "
                "result: model = model.merge_and_unload().dequantize(), then quantize_model(model, ...)."
            )

    def unmerge(self) -> None:
        """Takes the merged adapters out and restores the quantized base, bit for bit."""
        super().unmerge()
        if self._set_aside and not self.merged:
            (base,), dense = self._set_aside, self.base_layer
            self._set_aside = ()
            weight = cast(Tensor, dense.weight)
            self.base_layer = base.to(device=weight.device, dtype=weight.dtype)
