"""Runs a model on calibration inputs of any kind.

Inputs are token ids, or a processor's output for text and images: a mapping of arguments that is passed to the model's
own forward, so that image features enter the hidden states exactly as the model does it. The head is left out wherever
the model takes the same arguments without it, because logits are not needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import CalibrationDataError, ModelStructureError
from ..machine_errors import reraise_of_machine

ModelInputs = Tensor | Mapping[str, Any]
"""Token ids without padding, (batch, tokens) int64, or a processor's output."""

TRIAL_TOKENS = 8
"""Number of tokens in a forward pass that only shows which layers run."""

NO_DATA = frozenset(
    ("self", "labels", "inputs_embeds", "past_key_values", "use_cache", "cache_position", "return_dict",
     "output_attentions", "output_hidden_states", "logits_to_keep", "loss_mask")
)  # fmt: skip
"""Arguments of forward passes that are not data: they say how to compute, or replace the data."""


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Returns the names of the data arguments of the model's forward pass, with or without its head."""
    return (_named_arguments(model) | _named_arguments(without_head(model))) - NO_DATA


def kind_of(inputs: ModelInputs) -> frozenset[str]:
    """Returns the names of the inputs; batches with equal names run the same layers."""
    return frozenset(inputs) if isinstance(inputs, Mapping) else frozenset(("input_ids",))


def token_ids_of(inputs: ModelInputs) -> Tensor:
    """Returns the token ids, (batch, tokens) int64, including padding."""
    return inputs["input_ids"] if isinstance(inputs, Mapping) else inputs


def text_passes(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that may run on token ids alone: the model without its head, and its text decoder."""
    passes = [without_head(model)]
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
    if isinstance(decoder, nn.Module) and all(decoder is not known for known in (*passes, model)):
        passes.append(decoder)
    return passes


class ForwardPass:
    """Runs a model on inputs of any kind.

    Args:
        model: the whole model.
        text: the part of the model that is run on token ids alone; by default the model without its head.
    """

    def __init__(self, model: nn.Module, text: nn.Module | None = None):
        self.model = model
        self.text = text or without_head(model)

    def __call__(self, inputs: ModelInputs) -> None:
        """Runs one forward pass, and discards its output; see `output`."""
        self.output(inputs)

    def output(self, inputs: ModelInputs) -> Any:
        """Runs one forward pass without a cache; returns what the model, without its head if possible, returns.

        Raises:
            CalibrationDataError: the model failed on a processor's output.
        """
        if not isinstance(inputs, Mapping):
            return called(self.text, {"input_ids": inputs})
        try:
            return called(self._taking(inputs), self._cast(inputs))
        except (ModelStructureError, CalibrationDataError):
            raise
        except Exception as error:  # of any kind: modeling code can raise anything
            reraise_of_machine(error)
            raise CalibrationDataError(
                f"The forward pass of {type(self.model).__name__} failed on a sample with the keys "
                f"{', '.join(map(repr, inputs))} ({type(error).__name__}: {error}). Expected what its processor "
                'returns with return_tensors="pt", so that model(**sample) runs.'
            ) from error

    def _taking(self, inputs: Mapping[str, Any]) -> nn.Module:
        """Returns the model without its head, or the whole model if only that takes all of `inputs` by name."""
        headless = without_head(self.model)
        is_enough = _named_arguments(headless) >= _named_arguments(self.model) & inputs.keys()
        return headless if is_enough else self.model

    def _cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Casts pixels to the model's dtype, as `processor(...).to(model.dtype)` does."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

        def cast_leaf(value: Any) -> Any:
            if isinstance(value, list):
                return [cast_leaf(item) for item in value]
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return {name: cast_leaf(value) for name, value in inputs.items()}


def called(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Returns what a forward pass without a cache returns."""
    if "use_cache" in _named_arguments(module) or _takes_any(module):
        arguments = {**arguments, "use_cache": False}
    return module(**arguments)


def without_head(model: nn.Module) -> nn.Module:
    """Returns the part of a model that ends with its last hidden states; the model itself if it has no such part."""
    return cast(nn.Module, getattr(model, "base_model", model))


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    forward: Callable[..., Any] = type(module).forward
    return list(inspect.signature(forward).parameters.values())


def _named_arguments(module: nn.Module) -> frozenset[str]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(parameter.name for parameter in _parameters(module) if parameter.kind not in variable)


def _takes_any(module: nn.Module) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _parameters(module))


def placeholder_ids(model: nn.Module) -> frozenset[int]:
    """Returns the token ids that the config names: those of images, the start and end of a text, and the like."""
    ids: set[int] = set()
    configs = [config] if (config := getattr(model, "config", None)) is not None else []
    while configs:
        for name, value in vars(configs.pop()).items():
            if isinstance(value, PreTrainedConfig):
                configs.append(value)
            elif name.endswith(("token_id", "token_index")):
                ids |= {
                    token_id
                    for token_id in (value if isinstance(value, list) else [value])
                    if isinstance(token_id, int)
                }
    return frozenset(ids)


def text_in(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> Tensor:
    """Returns the token ids of samples without image placeholders, (tokens,) int64; a trial text if too few remain."""
    ids = torch.cat([sample["input_ids"].flatten() for sample in samples])
    is_text = ~torch.isin(ids, torch.tensor(sorted(placeholder_ids(model)), dtype=torch.int64))
    return ids[is_text] if int(is_text.sum()) >= TRIAL_TOKENS else trial_text()[0]


def trial_text() -> Tensor:
    """Returns a few tokens that only show which layers run, (1, tokens) int64."""
    return torch.arange(TRIAL_TOKENS).unsqueeze(0)
