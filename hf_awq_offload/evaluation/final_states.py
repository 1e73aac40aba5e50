"""The last hidden states of a model whose decoder layers run elsewhere: what its head turns into logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.forward_pass import ForwardPass, ModelInputs
from ..errors import ModelStructureError
from ..model.decoder_layers import shadowed_forward


class KeptOutputs(ForwardPass):
    """Runs a model without its head, and keeps the last hidden states once it is told to.

    Args:
        model: the whole model.
        text: the part of it that runs on token ids.
    """

    def __init__(self, model: nn.Module, text: nn.Module):
        super().__init__(model, text)
        self.is_keeping = False
        self.template: Any = None
        """What the part returned last, whose hidden states others take the place of."""
        self._states: dict[int, Tensor] = {}

    def output(self, inputs: ModelInputs) -> Any:
        output = super().output(inputs)
        if self.is_keeping:
            self._states[id(inputs)] = last_hidden(output, self.text).cpu()
            self.template = output
        return output

    def take(self, inputs: ModelInputs) -> Tensor:
        """Returns the last hidden states of a batch, (batch, tokens, hidden) on the CPU, and forgets them."""
        return self._states.pop(id(inputs))


def last_hidden(output: Any, module: nn.Module) -> Tensor:
    """Returns the last hidden states from a model's output, (batch, tokens, hidden).

    Raises:
        ModelStructureError: there are none where they are expected.
    """
    states = getattr(output, "last_hidden_state", None)
    states = output[0] if states is None and isinstance(output, tuple) else states
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise ModelStructureError(
            f"{type(module).__name__} returns a {type(output).__name__} without last_hidden_state of shape (batch, "
            "tokens, hidden); expected what transformers' models return without their head. Evaluate this model with "
            "streamed=False (--no-streamed)."
        )
    return states


@torch.no_grad()
def run_after_layers(
    forward: KeptOutputs,
    layers: Mapping[str, nn.Module],  # name -> decoder layer
    forms: Mapping[type, Any],  # class of a layer -> an output of such a layer
    batch: Tensor,  # (batch, tokens) int64
    hidden: Tensor,  # (batch, tokens, hidden): what the last decoder layer put out
) -> Tensor:
    """Returns the last hidden states, (batch, tokens, hidden): `forward` runs with every layer stubbed."""

    def stub(layer: nn.Module) -> Callable[..., Any]:
        form = forms[type(layer)]
        return lambda *args, **kwargs: hidden if isinstance(form, Tensor) else (hidden, *form[1:])

    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(shadowed_forward(layer, stub(layer)))
        forward(batch)
    return forward.take(batch)
