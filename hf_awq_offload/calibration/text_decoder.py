"""Finds the layers of a model's text decoder, and how the model runs on text alone.

In a model of text alone, no other layers run. In an image-text model, vision and audio towers run too. A measurement
tells them from the decoder: a layer belongs to the decoder if its inputs are computed from the embeddings of the text's
tokens, and so does every other layer of the same list (cross-attention layers, which only some samples reach, stand
between the others). Towers and projectors stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CalibrationDataError, ModelStructureError
from ..logs import get_logger
from ..machine_errors import reraise_of_machine
from ..model.decoder_layers import (
    LayerCall,
    LayerRunner,
    calibration_mode,
    candidate_layers,
    shadowed_forward,
    tensors_in,
)
from .forward_pass import ForwardPass, ModelInputs, text_passes, token_ids_of, trial_text
from .paused_forward import like_given, paused_forwards, run_and_resume
from .skeleton import frozen, record_skeleton, requiring_grad

logger = get_logger(__name__)

RunLayer = Callable[[str, Callable[[LayerRunner], Any]], Any]
"""Puts the layer of a name on its device, calls a function with its runner, and returns what that returned."""


@dataclass(frozen=True)
class Decoder:
    """Names the layers that are calibrated, and runs their model."""

    forward: ForwardPass
    layers: Mapping[str, nn.Module]
    """Name -> layer; not all of them need to run."""


def find_decoder(
    model: nn.Module, samples: Sequence[ModelInputs], run_layer: RunLayer, needs_text: bool
) -> tuple[Decoder, bool]:
    """Returns what of `model` is calibrated on samples and text, and whether the model runs on text alone.

    Args:
        model: the whole model.
        samples: a processor's outputs; may be empty.
        run_layer: runs a layer on its device.
        needs_text: whether there is plain text to calibrate on.

    Raises:
        ModelStructureError: there is plain text, and the model does not run on that.
    """
    has_towers = len({_list_of(name) for name in candidate_layers(model)}) > 1
    forward = text_forward(model, run_layer, may_fail=bool(samples) or has_towers)
    if forward is None and (needs_text or not samples):
        raise ModelStructureError(
            f"{type(model).__name__} does not run on text alone, and calibration data holds plain text. Pass what its "
            'processor returns for text and images: dataset=[processor(text=..., images=..., return_tensors="pt"), …].'
        )
    if not samples:
        assert forward is not None
        return Decoder(forward, candidate_layers(model)), True
    smallest = min(samples, key=lambda inputs: token_ids_of(inputs).numel())
    return Decoder(forward or ForwardPass(model), decoder_layers(model, smallest, run_layer)), forward is not None


def text_forward(model: nn.Module, run_layer: RunLayer, may_fail: bool = False) -> ForwardPass | None:
    """Returns how `model` runs on token ids alone: as a whole, or only its text decoder. None if it does not.

    A model with no choice is tried only if it `may_fail`.
    """
    passes = text_passes(model)
    if len(passes) == 1 and not may_fail:
        return ForwardPass(model)
    for part in passes:
        forward = ForwardPass(model, part)
        try:
            layers_in_order(model, candidate_layers(model), trial_text(), run_layer, forward)
        except Exception as error:  # of any kind: modeling code raises what it likes
            reraise_of_machine(error)
            logger.info("%s does not run on text alone: %r", type(part).__name__, error)
        else:
            return forward
    return None


def layers_in_order(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: ModelInputs,
    run_layer: RunLayer,
    forward: Callable[[ModelInputs], None],
) -> list[str]:
    """Returns the names of the `layers` that a forward pass runs, in its order, with repetitions."""
    try:
        return record_skeleton(model, [inputs], layers, forward).layer_names
    except Exception as error:  # of any kind: stubs can break what a model computes between its layers
        reraise_of_machine(error)
        return order_of_layers(model, layers, inputs, run_layer, forward)


def order_of_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: ModelInputs,
    run_layer: RunLayer,
    forward: Callable[[ModelInputs], None],
) -> list[str]:
    """Returns what `layers_in_order` does, from a forward pass that really runs every layer.

    Raises:
        ModelStructureError: none ran.
    """
    order: list[str] = []
    with paused_forwards(model, layers, [inputs], forward) as (paused,):
        paused.start()
        while paused.at is not None:
            order.append(paused.at)
            run_layer(paused.at, lambda runner: run_and_resume(paused, runner))
    if not order:
        raise ModelStructureError(
            f"The forward pass of {type(model).__name__} ran none of its candidate decoder layers; expected a causal "
            "language model that takes input_ids."
        )
    return order


def decoder_layers(model: nn.Module, sample: ModelInputs, run_layer: RunLayer) -> dict[str, nn.Module]:
    """Returns the candidate layers of the text decoder: their inputs depend on the text's embeddings.

    Args:
        model: the whole model.
        sample: a processor's output.
        run_layer: runs the layers of towers.

    Raises:
        CalibrationDataError: the model does not run on the sample.
        ModelStructureError: the text reaches no layer.
    """
    candidates = candidate_layers(model)
    reached: set[str] = set()
    learned: dict[type, Any] = {}

    def stub(name: str, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
                return _on_device(run_layer, name, forward, args, kwargs)
            reached.add(name)
            if type(layer) not in learned:
                learned[type(layer)] = _on_device(run_layer, name, forward, args, kwargs)
            hidden = requiring_grad(next(iter(tensors_in((args, kwargs)))))
            return hidden if isinstance(learned[type(layer)], Tensor) else (hidden, *learned[type(layer)][1:])

        return run

    embeddings = cast(Any, model).get_input_embeddings()
    with ExitStack() as stack:
        stack.enter_context(calibration_mode(model))
        stack.enter_context(frozen(model))
        for name, layer in candidates.items():
            stack.enter_context(shadowed_forward(layer, stub(name, layer, layer.forward)))
        handle = embeddings.register_forward_hook(lambda module, args, output: requiring_grad(output))
        stack.callback(handle.remove)
        try:
            with torch.enable_grad():
                ForwardPass(model)(sample)
        except CalibrationDataError as error:
            if not reached:  # else a stub may have broken what the model computes behind a layer
                raise
            logger.info("Looking for the decoder layers of %s ended early: %s", type(model).__name__, error)
    lists = {_list_of(name) for name in reached}
    if not lists:
        raise ModelStructureError(
            f"No layer of {type(model).__name__} depends on the embeddings of the text in a sample; expected an "
            "image-text model whose decoder reads input_ids."
        )
    return {name: layer for name, layer in candidates.items() if _list_of(name) in lists}


@contextmanager
def towers_on_device(model: nn.Module, decoder: Mapping[str, nn.Module], run_layer: RunLayer) -> Iterator[None]:
    """Brings layers outside the decoder to the execution device whenever the model runs them, one at a time."""

    def stub(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: _on_device(run_layer, name, forward, args, kwargs)

    with ExitStack() as stack:
        for name, layer in candidate_layers(model).items():
            if name not in decoder:
                stack.enter_context(shadowed_forward(layer, stub(name, layer.forward)))
        yield


def _on_device(
    run_layer: RunLayer, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs a layer's own `forward` on its device; returns tensors on the device and in the dtype that it was given."""
    call = LayerCall(args, kwargs)
    return run_layer(name, lambda runner: runner.run_for_caller(call, like_given(args, kwargs), forward))


def _list_of(layer_name: str) -> str:
    return layer_name.rpartition(".")[0]
