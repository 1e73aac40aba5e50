"""A model's head by itself: turns rows of last hidden states into logits, as the model's own forward does it.

Logits of all tokens would take tokens × vocabulary. The model's own forward runs instead on as many rows as there is
room for, its body stubbed by what returns their hidden states, so that whatever follows the body (scales, soft caps) is
computed as the model computes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.forward_pass import called, without_head
from ..errors import ModelStructureError
from ..model.decoder_layers import shadowed_forward
from ..offload.stored_weights import StoredWeights
from ..ops.blocks import matmul_dtype
from .final_states import last_hidden

TOLERANCE = 1e-2
"""By how much logits of a row alone may differ from those of the same row among others, of the largest logit."""


class Head:
    """Computes logits on the execution device.

    Args:
        model: the whole model.
        template: what its body returned on some batch.
        dtype: rows are computed in it.
        device: the execution device, which holds the head's weights.
    """

    def __init__(self, model: PreTrainedModel, template: Any, dtype: torch.dtype, device: torch.device):
        self._model, self._template, self._dtype, self._device = model, template, dtype, device
        self._rows: Tensor | None = None

    def body_output(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the body's forward."""
        assert self._rows is not None
        if isinstance(self._template, tuple):
            return (self._rows, *self._template[1:])
        output = copy.copy(self._template)
        output.last_hidden_state = self._rows
        return output

    @torch.no_grad()
    def logits(
        self,
        states: Tensor,  # (rows, hidden): last hidden states
        token_ids: Tensor,  # (rows,) int64
    ) -> Tensor:
        """Returns the logits on the execution device, (rows, vocabulary)."""
        self._rows = states.to(self._device, self._dtype).unsqueeze(0)
        try:
            logits = called(self._model, {"input_ids": token_ids.unsqueeze(0).to(self._device)}).logits
        finally:
            self._rows = None
        if logits.shape[:2] != (1, len(states)):
            raise self._refusal(f"gives logits of shape {tuple(logits.shape)} for {len(states)} tokens")
        return logits[0]

    def require_rows_apart(self, states: Tensor, token_ids: Tensor) -> None:
        """Checks on two rows or more that the logits of a row depend on this row alone.

        Raises:
            ModelStructureError: they do not.
        """
        together, alone = self.logits(states, token_ids)[-1], self.logits(states[-1:], token_ids[-1:])[0]
        if float((together - alone).abs().max()) > TOLERANCE * float(together.abs().max()):
            raise self._refusal("computes logits from several tokens at once")

    def _refusal(self, what: str) -> ModelStructureError:
        return ModelStructureError(
            f"{type(self._model).__name__} {what} after its last hidden states; expected one row of logits for each "
            "token. Evaluate this model with streamed=False (--no-streamed)."
        )


def require_body(model: PreTrainedModel) -> nn.Module:
    """Returns the model without its head.

    Raises:
        ModelStructureError: the two cannot be told apart.
    """
    body = without_head(model)
    if body is model:
        raise ModelStructureError(
            f"{type(model).__name__} has no part that it names as its base model, so its head can't run by itself. "
            "Evaluate this model with streamed=False (--no-streamed)."
        )
    return body


@contextmanager
def head_of(
    model: PreTrainedModel,
    template: Any,  # what the body returned on some batch
    device: torch.device,
    weights: StoredWeights | None,  # of a model on the meta device
) -> Iterator[Head]:
    """Yields the head, its weights on the device; on exit they are what they were."""
    body = require_body(model)
    inside = {id(part) for part in body.modules()}
    names: dict[int, list[str]] = {}  # parameter -> all of its names, of which the files hold one
    for name, named in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(named), []).append(name)
    given = last_hidden(template, body).dtype
    dtype = matmul_dtype(device.type, given)
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in model.modules():
            if id(part) in inside:
                continue
            for key, parameter in part._parameters.items():
                if parameter is None:
                    continue
                value = parameter.detach()
                if weights is not None and parameter.is_meta:
                    of_parameter = names[id(parameter)]
                    value = weights.read(next(filter(weights.places.__contains__, of_parameter), of_parameter[0]))
                wanted = dtype if value.dtype == given else None
                replaced.append((part._parameters, key, parameter))
                part._parameters[key] = nn.Parameter(value.to(device, wanted), requires_grad=False)
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    replaced.append((part._buffers, key, buffer))
                    part._buffers[key] = buffer.to(device)
        head = Head(model, template, dtype, device)
        with shadowed_forward(body, head.body_output):
            yield head
    finally:
        for owner, key, tensor in reversed(replaced):
            owner[key] = tensor
