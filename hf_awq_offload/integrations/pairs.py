"""Checks that two checkpoints are a model and its original, before any of their weights is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigError
from .checkpoint_size import adapter_base
from .load_call import HUB_ARGUMENTS, can_be_asked

SHAPES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""Fields of a text decoder's config that quantizing does not change, as far as a model has them."""
PLACES = ("revision", "subfolder", "variant")
"""Arguments of `from_pretrained` that tell models of one name apart."""
REMEDY = "Expected a model and the original that it was quantized from."


def hub_arguments_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the arguments of `from_pretrained` that say where files come from, and whether code may run."""
    found = {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}
    return found if can_be_asked() else {"trust_remote_code": False} | found


def config_of(model: str | os.PathLike[str] | PreTrainedModel, arguments: Mapping[str, Any]) -> Any:
    """Returns the config of a checkpoint or of a model in memory; an adapter has that of its base.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if isinstance(model, PreTrainedModel):
        return model.config
    name = os.fspath(model)
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise CheckpointError(f"There is no folder {name}; expected a checkpoint folder, or a name on the Hub.")
    if (base := adapter_base(model, arguments)) is not None:
        name, arguments = base, {key: value for key, value in arguments.items() if key not in ("revision", "subfolder")}
    try:
        return AutoConfig.from_pretrained(name, **hub_arguments_among(arguments))
    except OSError as error:
        raise CheckpointError(
            f"{name} holds no config.json that can be read, or could not be downloaded: {error} Expected a checkpoint "
            "folder, or a name on the Hub."
        ) from error


def require_two(sides: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    """Checks that a model is not compared with itself; each side is a model and arguments of `from_pretrained`.

    Raises:
        ConfigError: both sides are one model in memory, or have one name and one place on the Hub.
    """
    if len(sides) < 2:
        return
    (model, arguments), (other, of_other) = sides
    if isinstance(model, PreTrainedModel) or isinstance(other, PreTrainedModel):
        is_one = model is other
    else:
        places = [{name: given.get(name) for name in PLACES} for given in (arguments, of_other)]
        is_one = os.fspath(model) == os.fspath(other) and places[0] == places[1]
    if is_one:
        raise ConfigError(
            "The model is compared with itself; expected a quantized model and its original. On one repository, name "
            "the original's revision (against_revision=..., --against-revision)."
        )


def require_pair(configs: Sequence[Any]) -> None:
    """Compares the configs of a model and of its original; of one model alone, there is nothing to compare.

    Raises:
        CheckpointError: they differ in type, vocabulary or shape.
    """
    if len(configs) < 2:
        return
    config, reference = configs
    if config.model_type != reference.model_type:
        raise CheckpointError(
            f"The model is a {config.model_type}, the one that it is compared with a {reference.model_type}. {REMEDY}"
        )
    texts = [each.get_text_config(decoder=True) for each in (config, reference)]
    for name in SHAPES:
        found, expected = (getattr(text, name, None) for text in texts)
        if found != expected and None not in (found, expected):
            what = "They predict different vocabularies" if name == "vocab_size" else "They are models of other sizes"
            raise CheckpointError(
                f"{name} is {found} in the model's config.json, and {expected} in that of the model that it is "
                f"compared with. {what}. {REMEDY}"
            )


def require_same_tokens(
    token_ids: Tensor,  # (tokens,) int64
    of_reference: Tensor,  # (tokens,) int64
    tokenizers: Sequence[Any],  # which made them
) -> None:
    """Compares what two tokenizers have made of one text; one may have read further.

    Raises:
        CheckpointError: they differ.
    """
    both = min(len(token_ids), len(of_reference))
    differs = (token_ids[:both] != of_reference[:both]).nonzero()
    if not len(differs):
        return
    place = int(differs[0])
    found, expected = (
        f"{int(ids[place])} ({tokenizer.convert_ids_to_tokens(int(ids[place]))!r})"
        for ids, tokenizer in zip((token_ids, of_reference), tokenizers, strict=True)
    )
    raise CheckpointError(
        f"The tokenizers of the two models differ: token {place} of the text is {found} for the model, and {expected} "
        f"for the one that it is compared with. {REMEDY} If only the files differ, name one tokenizer for both "
        "(tokenizer=..., --tokenizer)."
    )
