"""Runs a decoder layer on the short calls of a probe, in fp32 and with scaled parameters, in little memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.quantized_linear import packed_tensors
from .cast_parameters import Casts, parameters_in_fp32
from .decoder_layers import LayerCall, map_leaves, observed_tensors
from .scalings import Scalings


class ProbeRunner:
    """Runs one decoder layer in fp32; its weights stay as they are.

    Args:
        layer: the decoder layer, already on `device`.
        device: the device to compute on.
        keeps_casts: keep the parameters' casts to fp32; None: on a CPU only, where allocating them takes the most time.
    """

    def __init__(self, layer: nn.Module, device: torch.device, keeps_casts: bool | None = None):
        self._layer = layer
        self._device = device
        self._casts: Casts | None = {} if keeps_casts or (keeps_casts is None and device.type == "cpu") else None
        self._packed = packed_tensors(layer)
        named = layer.named_buffers(remove_duplicate=False)
        self._buffers = {name: self._moved(buffer) for name, buffer in named if name not in self._packed}

    def on_device(self, call: tuple[LayerCall, Tensor]) -> tuple[LayerCall, Tensor]:
        """Returns a call with all its tensors on the device, floating-point ones in fp32."""
        recorded, hidden = call

        def move(leaf: object) -> object:
            return self._moved(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = map_leaves(recorded.args, move), map_leaves(recorded.kwargs, move)
        return LayerCall(args, kwargs), self._moved(hidden)

    @torch.no_grad()
    def observe(self, call: tuple[LayerCall, Tensor], scalings: Scalings | None = None) -> list[Tensor]:
        """Returns every floating-point tensor that the layer returns or writes to the state among its arguments.

        The layer computes on copies of the call's tensors, which it may write to.
        """
        recorded, hidden = call
        bound = recorded.bind(hidden, lambda tensor: self._moved(tensor, copy=True))
        with parameters_in_fp32(self._layer, scalings or {}, self._packed, self._casts):
            output = torch.func.functional_call(self._layer, self._buffers, *bound, tie_weights=False)
        return observed_tensors(bound, output)

    def _moved(self, tensor: Tensor, copy: bool = False) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else None
        return tensor.detach().to(device=self._device, dtype=dtype, non_blocking=True, copy=copy)
