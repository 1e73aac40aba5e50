"""Chooses how the decoder layers of a model are fed, by trying the model: as a chain, or from paused forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain

import torch
from torch import nn

from ..errors import ModelStructureError
from ..logs import get_logger
from ..machine_errors import reraise_of_machine
from ..model.decoder_layers import candidate_layers
from ..model.mtp_layer import MtpLayer
from ..offload.devices import CPU
from ..offload.hidden_storage import HiddenStorage
from .batches import Batches
from .chain_inputs import ChainInputs
from .forward_pass import ForwardPass, ModelInputs, kind_of, trial_text
from .layer_inputs import LayerInputs
from .mtp_inputs import MtpInputs, mtp_inputs
from .paused_forward import paused_forwards
from .paused_inputs import PausedInputs
from .skeleton import NotAChainError, Skeleton, record_skeleton
from .text_decoder import Decoder, RunLayer, layers_in_order, order_of_layers, text_forward, towers_on_device

logger = get_logger(__name__)


@contextmanager
def open_layer_inputs(
    model: nn.Module,
    cut: Callable[[int], Batches],
    batch_tokens: int,
    run_layer: RunLayer,
    decoder: Decoder | None = None,
    storage: HiddenStorage | None = None,
    other_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    mtp: MtpLayer | None = None,
    device: torch.device = CPU,
) -> Iterator[LayerInputs]:
    """Yields the inputs of the model's decoder layers; on exit no forward pass is left waiting.

    Args:
        model: the whole model.
        cut: makes batches of at most so many tokens.
        batch_tokens: tokens of the first batches.
        run_layer: brings a layer to its device to run it.
        decoder: what is calibrated; by default every layer that runs on text.
        storage: keeps the hidden states of a chain; by default RAM.
        other_weights: loads what the model runs beside its decoder layers, as long as its context is open.
        mtp: a layer for multi-token prediction, which comes last; left out if the layers form no chain.
        device: where the inputs of `mtp` are computed.

    Raises:
        ModelStructureError: no decoder layer runs, or the layers that run differ from batch to batch.
    """
    decoder = decoder or Decoder(ForwardPass(model), candidate_layers(model))
    batches = cut(batch_tokens)

    def record(batches: Iterable[ModelInputs]) -> Skeleton:
        with other_weights():
            return record_skeleton(model, batches, decoder.layers, decoder.forward)

    with towers_on_device(model, decoder.layers, run_layer):
        ending = partial(mtp_inputs, model, decoder, mtp, other_weights=other_weights, device=device)
        inputs = _chain(record, batches, cut, storage or HiddenStorage(), run_layer, type(model).__name__, ending)
        if inputs is not None:
            yield inputs
            return
        with other_weights():
            yield from _paused(model, batches, run_layer, decoder)


def _chain(
    record: Callable[[Iterable[ModelInputs]], Skeleton],
    batches: Batches,
    cut: Callable[[int], Batches],
    storage: HiddenStorage,
    run_layer: RunLayer,
    model_name: str,
    ending: Callable[[Skeleton, Batches], MtpInputs | None],
) -> ChainInputs | None:
    """Returns the inputs of a chain, or None if the layers form none.

    Nothing but these inputs holds on to the hidden states: they are freed when the first layer is done.
    """
    try:
        skeleton = record(batches)
        return ChainInputs(skeleton, batches, record, cut, storage, run_layer, ending(skeleton, batches))
    except NotAChainError as reason:
        logger.info("Forward passes of %s are paused at each decoder layer: %s", model_name, reason)
    except ModelStructureError:
        raise
    except Exception as error:  # of any kind: stubs can break what a model computes between its layers
        reraise_of_machine(error)
        logger.info("Forward passes of %s are paused at each decoder layer: %r", model_name, error)
    return None


def _paused(model: nn.Module, batches: Batches, run_layer: RunLayer, decoder: Decoder) -> Iterator[LayerInputs]:
    kinds = {kind_of(batch): batch for batch in reversed(list(batches))}
    orders = {
        kind: order_of_layers(model, decoder.layers, batch, run_layer, decoder.forward) for kind, batch in kinds.items()
    }
    layers = {name: decoder.layers[name] for name in dict.fromkeys(chain.from_iterable(orders.values()))}
    with paused_forwards(model, layers, list(batches), decoder.forward) as passes:
        orders_of_passes = [orders[kind_of(batch)] for batch in batches]
        yield PausedInputs(passes, orders_of_passes, batches, type(model).__name__)


def layers_that_run(model: nn.Module, run_layer: RunLayer) -> list[str]:
    """Returns the decoder layers that run on a few tokens of text, in the model's order, each once."""
    forward = text_forward(model, run_layer) or ForwardPass(model)
    return list(dict.fromkeys(layers_in_order(model, candidate_layers(model), trial_text(), run_layer, forward)))
