"""PEFT's LoRA layer on a quantized linear: merging makes it dense, unmerging brings the 4 bits back.

    merge:    base (4 bits)  ->  dense = dequantized base, + ΔW in the model's dtype
    unmerge:  the base that was set aside comes back, to the bit

Rejected: rounding W + ΔW to the base's grid. W lies on the grid, and LoRA adds mostly less than half a step to it, so
that rounding to the nearest gives W again and the adapter is lost (docs/log.md has the figures). Quantizing the merged
model on calibration data is `quantize_model`'s work.
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
    """LoRA, DoRA and their kin on a quantized linear."""

    _set_aside: tuple[QuantizedLinear, ...] = ()
    """While merged, the quantized base; in a tuple, so that it is no submodule and in no state dict."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a dense linear in the model's dtype."""
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
                "rounding the sums to few bits without data would lose most of what was learned. For few bits again: "
                "model = model.merge_and_unload().dequantize(), then quantize_model(model, ...)."
            )

    def unmerge(self) -> None:
        """Take the merged adapters out; the quantized base is as it was before."""
        super().unmerge()
        if self._set_aside and not self.merged:
            (base,), dense = self._set_aside, self.base_layer
            self._set_aside = ()
            weight = cast(Tensor, dense.weight)
            self.base_layer = base.to(device=weight.device, dtype=weight.dtype)
