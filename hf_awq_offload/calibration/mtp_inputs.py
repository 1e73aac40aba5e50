"""What enters a decoder layer for multi-token prediction (MTP), as servers compute it for speculative decoding.

The model's own forward runs once more on every batch, with all of its decoder layers stubbed: the first call of a stub
shows the embeddings, and every stub returns what the last decoder layer really put out, so that the model computes from
it what it gives to its head (vLLM feeds its MTP layers with that, the final norm applied). The stem of the MTP layer
(model/mtp_layer.py) joins this with the embedding of the token that follows.

The last token of a sequence has no successor: its input is made up, and it does not count. No other token sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..checkpoint.stored_tensor import read
from ..errors import ModelStructureError
from ..logs import get_logger
from ..machine_errors import reraise_of_machine
from ..model.decoder_layers import HIDDEN, LayerCall, calibration_mode, output_hidden, runner_on, shadowed_forward
from ..model.mtp_layer import MtpLayer, read_stem
from .batches import Batches
from .forward_pass import ModelInputs, token_ids_of
from .skeleton import Skeleton, frozen
from .text_decoder import Decoder

logger = get_logger(__name__)


class MtpInputs:
    """Computes the inputs of an MTP layer from the outputs of the model's last decoder layer.

    Args:
        model: the whole model.
        decoder: runs it.
        mtp: the layer.
        outputs: class of a decoder layer -> something that such a layer has returned.
        other_weights: loads what the model runs beside its decoder layers, as long as its context is open.
        device: where the stem is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        mtp: MtpLayer,
        outputs: Mapping[type, Any],
        other_weights: Callable[[], AbstractContextManager[None]],
        device: torch.device,
    ):
        self.name, self.twin = mtp.name, mtp.twin
        self._model, self._decoder, self._mtp, self._outputs = model, decoder, mtp, outputs
        self._other_weights, self._device = other_weights, device

    def require(self, skeleton: Skeleton, batches: Batches) -> None:
        """Computes the inputs of a probe, from any hidden states, to see that it can be done.

        Raises:
            ModelStructureError: it can't.
        """
        if skeleton.calls.get(self.twin, {}).keys() < set(range(len(skeleton.hidden))):
            raise ModelStructureError(f"{self.twin}, which is like it, does not run on all data")
        if not any(counted.any() for counted in self.counted(batches)):
            raise ModelStructureError("no token of the data has a successor")
        with self._other_weights():
            self._ends_of_model(batches.probes[0], skeleton.hidden[0])

    def counted(self, batches: Batches) -> list[Tensor]:
        """Returns which tokens of each batch enter the statistics, (B, T) bool: those whose successor does, too."""
        masks = []
        for batch, counted in zip(batches.data, batches.counted, strict=True):
            own = torch.ones(token_ids_of(batch).shape, dtype=torch.bool) if counted is None else counted.bool()
            following = torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], dim=1)
            masks.append(own & following)
        return masks

    def entering(self, batches: Batches, hidden: list[Tensor]) -> Iterator[Tensor]:
        """Yields what enters the MTP layer, batch by batch, (B, T, H) on the CPU.

        Args:
            batches: the data.
            hidden: outputs of the last decoder layer, one tensor (B, T, H) for each batch.
        """
        stem = read_stem(self._mtp.stem, self._model.get_submodule(self.name)).to(self._device)
        runner = runner_on(stem, self._device)
        with self._other_weights(), self._own_embeddings():
            for batch, outputs in zip(batches.data, hidden, strict=True):
                embeddings, given_to_head = self._ends_of_model(batch, outputs)
                following = embeddings.roll(-1, dims=1)
                entering = runner(LayerCall((HIDDEN, following), {}), given_to_head)
                yield entering.to(device=outputs.device, dtype=outputs.dtype)

    @torch.no_grad()
    def _ends_of_model(self, batch: ModelInputs, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what enters the first decoder layer, and what the model makes of the last one's outputs."""
        entering: list[Tensor] = []
        results: list[Any] = []

        def stub(layer: nn.Module) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                entering.append(args[0] if args else next(iter(kwargs.values())))
                like = self._outputs[type(layer)]
                return outputs if isinstance(like, Tensor) else (outputs, *like[1:])

            return run

        decoder = _decoder_of(self._model)
        with ExitStack() as stack:
            stack.enter_context(calibration_mode(self._model))
            stack.enter_context(frozen(self._model))
            for layer in self._decoder.layers.values():
                stack.enter_context(shadowed_forward(layer, stub(layer)))
            handle = decoder.register_forward_hook(lambda module, args, output: results.append(output))
            stack.callback(handle.remove)
            self._decoder.forward(batch)
        given_to_head = output_hidden(results[-1]) if results else None
        if not isinstance(given_to_head, Tensor) or given_to_head.shape != outputs.shape:
            raise ModelStructureError(
                f"{type(decoder).__name__} returns no hidden states of the shape {tuple(outputs.shape)}"
            )
        return entering[0], given_to_head

    @contextmanager
    def _own_embeddings(self) -> Iterator[None]:
        """Lets the model use the embeddings that the checkpoint has for the MTP layer, if it has any."""
        stored = self._mtp.stem.embeddings
        if stored is None:
            yield
            return
        module = cast(Any, self._model).get_input_embeddings()
        original = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(read(stored).to(original.dtype), requires_grad=False)
        try:
            yield
        finally:
            module._parameters["weight"] = original


def _decoder_of(model: nn.Module) -> nn.Module:
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else cast(nn.Module, getattr(model, "base_model", model))


def mtp_inputs(
    model: nn.Module,
    decoder: Decoder,
    mtp: MtpLayer | None,
    skeleton: Skeleton,
    batches: Batches,
    other_weights: Callable[[], AbstractContextManager[None]],
    device: torch.device,
) -> MtpInputs | None:
    """Returns the inputs of an MTP layer; None if there is none, or if they can't be computed, which is logged."""
    if mtp is None:
        return None
    inputs = MtpInputs(model, decoder, mtp, skeleton.outputs, other_weights, device)
    try:
        inputs.require(skeleton, batches)
    except Exception as error:  # of any kind: stubs can break what a model computes behind its layers
        reraise_of_machine(error)
        logger.info("%s cannot be calibrated: %r", mtp.name, error)
        return None
    return inputs
