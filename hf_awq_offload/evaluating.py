"""`evaluate` measures how far a quantized model is from its original, also where neither fits into memory.

Two ways give the same figures. Models that fit are loaded whole, and run as they are. Others stay on the meta device;
their decoder layers are read from the checkpoints' files one at a time, and what is quantized is dequantized as it is
read (evaluation/layer_by_layer.py).
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .calibration.forward_pass import without_head
from .calibration.tokenizers import tokenizer_of
from .config import AwqOffloadConfig
from .errors import CalibrationDataError, ConfigError, MemoryLimitError
from .evaluation.layer_by_layer import EvaluatedModel, evaluate_layer_by_layer
from .integrations.checkpoint_size import adapter_base, checkpoint_bytes
from .integrations.lazy_loading import detach_stored_weights, load_on_meta
from .integrations.one_at_a_time import one_at_a_time
from .integrations.origin import EVERYWHERE, TOKENIZER_MARKERS, Origin
from .integrations.pairs import PLACES, config_of, hub_arguments_among, require_pair, require_same_tokens, require_two
from .integrations.quantizer import AwqOffloadQuantizer
from .integrations.registration import register
from .machine_errors import first_line, is_out_of_memory
from .messages import size_text
from .model.decoder_layers import candidate_layers
from .offload.devices import CPU, accelerator_bytes, default_execution_device
from .offload.hidden_storage import HiddenStorage
from .offload.memory_limit import at_most, large_blocks_apart, release_freed
from .offload.onloader import Onloader
from .pipeline.budget import ACCELERATOR_BATCH_TOKENS, ACCELERATOR_MEMORY_SHARE, CPU_BATCH_TOKENS, PROCESS_BYTES
from .pipeline.layer_sizes import LayerSizes
from .pipeline.run_storage import HIDDEN_SHARE, RAM_SHARE, free_ram_bytes
from .pipeline.run_storage import execution_device as execution_device_of
from .precision import ieee_products
from .reporting import evaluation as in_memory
from .reporting.distances import BLOCK_BYTES
from .reporting.evaluation import Evaluation, Window, sliding_windows
from .reporting.evaluation_text import WIKITEXT2, evaluation_tokens

Model = str | os.PathLike[str] | PreTrainedModel
Side = tuple[Model, dict[str, Any]]
"""A model, and arguments of `from_pretrained`."""

FP32_BYTES = 4

WINDOW_TOKENS = 512
MOST_TOKENS = 100_000


def evaluate(
    model: Model,
    *,
    against: Model | None = None,
    dataset: Any = WIKITEXT2,
    text_column: str | None = None,
    tokenizer: Any = None,
    window_tokens: int = WINDOW_TOKENS,
    stride_tokens: int | None = None,
    most_tokens: int = MOST_TOKENS,
    streamed: bool | None = None,
    max_memory: Mapping[str, int | str] | None = None,
    execution_device: str | None = None,
    batch_tokens: int | None = None,
    prefetch: bool = True,
    model_class: Any = AutoModelForCausalLM,
    dtype: Any = "auto",
    device_map: Any = "auto",
    against_revision: str | None = None,
    **kwargs: Any,
) -> Evaluation:
    """Measures a model on held-out text: against the text itself, and against the original.

    Args:
        model: a checkpoint's name or folder, quantized or not, or a model in memory.
        against: the original, likewise; without it, only the perplexity of `model` is measured.
        dataset: "wikitext2", a text file, or a data set with text as for calibration; or token ids, (tokens,) int64.
            Not the text that the model was calibrated on.
        text_column: the column of the data set that holds the text.
        tokenizer: a tokenizer, its name or path; by default that of `model`.
        window_tokens: length of a window of text, in tokens.
        stride_tokens: step between windows; half a window by default.
        most_tokens: where reading the text stops.
        streamed: hold one decoder layer of each model at a time, and read both from their files. None: only if they do
            not fit into memory. Models in memory are streamed from RAM, and have to be there.
        max_memory: device -> bytes or "8GiB": limits of a streamed evaluation, and what "fit" means.
        execution_device: runs the layers of a streamed evaluation; by default the accelerator, else the CPU.
        batch_tokens: tokens of a micro-batch of a streamed evaluation; by default as many as there is room for.
        prefetch: read the next layers while one runs.
        model_class: the Auto class that loads the models.
        dtype: their dtype; "auto" is each checkpoint's.
        device_map: for models that are loaded whole, as `from_pretrained` takes it.
        against_revision: branch, tag or commit of `against`.
        kwargs: passed to `from_pretrained` (token, …); revision, subfolder and variant are those of `model` alone.

    Raises:
        CheckpointError: the two models are not a pair (vocabulary, tokenizer, architecture), or one is missing.
        CalibrationDataError: the text can't be read, or is too short.
        ConfigError: the arguments contradict each other.
        MemoryLimitError: not even one layer of each model fits.
        ModelStructureError: the model can't be evaluated layer by layer.
        NumericalError: logits are not a number.
    """
    register()
    limits = streaming_limits(
        max_memory=max_memory, execution_device=execution_device, batch_tokens=batch_tokens, prefetch=prefetch
    )
    of_reference = {name: value for name, value in kwargs.items() if name not in PLACES}
    of_reference |= {} if against_revision is None else {"revision": against_revision}
    sides = [(model, kwargs)] + ([] if against is None else [(against, of_reference)])
    require_two(sides)
    stride = max(1, window_tokens // 2) if stride_tokens is None else stride_tokens
    if not 1 <= stride <= window_tokens or window_tokens < 2 or most_tokens < 2:
        raise ConfigError(
            f"window_tokens is {window_tokens}, stride_tokens {stride}, and most_tokens {most_tokens}; expected "
            "windows and a text of at least 2 tokens, and a stride between 1 and the window."
        )
    configs = [config_of(*side) for side in sides]
    require_pair(configs)
    if _are_token_ids(dataset):
        if text_column is not None:
            raise ConfigError(f"text_column is {text_column!r}, and the data set is token ids; leave it out.")
        token_ids = torch.as_tensor(dataset, dtype=torch.int64).flatten()[:most_tokens]
    else:
        tokenizers = _tokenizers(sides, tokenizer)
        token_ids = held_out_tokens(tokenizers, dataset, text_column, most_tokens)
    require_text(token_ids, configs[0], window_tokens)
    windows = sliding_windows(token_ids, window_tokens, stride)
    if streamed is None:
        streamed = not fits(sides, limits, device_map)
    if streamed:
        return evaluate_streamed(sides, windows, limits, model_class, dtype)
    loaded = [
        side
        if isinstance(side, PreTrainedModel)
        else model_class.from_pretrained(side, dtype=dtype, device_map=device_map, **arguments).eval()
        for side, arguments in sides
    ]
    return in_memory.evaluate(loaded[0], windows, loaded[1] if len(loaded) > 1 else None)


def streaming_limits(**fields: Any) -> AwqOffloadConfig:
    """Returns what a streamed evaluation keeps to: of a recipe, what says where weights are and how much room is."""
    return AwqOffloadConfig(offload="disk", from_quantized=True, **fields)


def _are_token_ids(dataset: Any) -> bool:
    if isinstance(dataset, list):
        return all(isinstance(token_id, int) for token_id in dataset)
    return isinstance(dataset, Tensor | np.ndarray)


def held_out_tokens(
    tokenizers: Sequence[Any],  # the model's and, if there is one, that of the original
    dataset: Any,
    text_column: str | None,
    most_tokens: int,
) -> Tensor:
    """Returns the token ids of a text, (tokens,) int64.

    Raises:
        CheckpointError: the tokenizers make different tokens of it.
        CalibrationDataError: the text can't be read.
    """
    if isinstance(dataset, Iterator):
        dataset = list(dataset)  # each tokenizer reads it
    found = [evaluation_tokens(dataset, tokenizer, most_tokens, text_column) for tokenizer in tokenizers]
    if len(found) > 1:
        require_same_tokens(found[0], found[1], tokenizers)
    return found[0]


def require_text(token_ids: Tensor, config: Any, window_tokens: int) -> None:
    """Checks that a text can be sent through a model of this config in windows of so many tokens.

    Raises:
        CalibrationDataError: it is too short, holds tokens that the model does not have, or windows are too long.
    """
    text = config.get_text_config(decoder=True)
    if len(token_ids) < 2:
        raise CalibrationDataError(
            f"The text has {len(token_ids)} tokens; expected at least two, better tens of thousands. Name another text."
        )
    vocabulary, positions = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    if vocabulary is not None and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        raise CalibrationDataError(
            f"The text has token ids from {int(token_ids.min())} to {int(token_ids.max())}, and the model has "
            f"{vocabulary} tokens. The tokenizer is of another model; name the model's own."
        )
    longest = min(window_tokens, len(token_ids))
    if isinstance(positions, int) and 0 < positions < longest:
        raise CalibrationDataError(
            f"Windows of the text have {longest} tokens, but the model has {positions} positions "
            f"(max_position_embeddings); set window_tokens (--window) to {positions} or less."
        )


def _tokenizers(sides: Sequence[Side], tokenizer: Any) -> list[Any]:
    """Returns the tokenizer for both models, or each one's own."""
    if tokenizer is not None:
        arguments = {name: value for name, value in hub_arguments_among(sides[0][1]).items() if name in EVERYWHERE}
        return [tokenizer_of(tokenizer, lambda: tokenizer, arguments)]
    own = tokenizer_of(None, lambda: _own_tokenizer(*sides[0]))
    others = (tokenizer_if_any(side) for side in sides[1:])
    return [own, *(other for other in others if other is not None)]


def tokenizer_if_any(side: Side) -> Any | None:
    """Returns a model's own tokenizer; None if it has none that loads."""
    try:
        return _own_tokenizer(*side)
    except (OSError, ValueError):
        return None


def _own_tokenizer(model: Model, arguments: Mapping[str, Any]) -> Any:
    source = str(model.config.name_or_path) if isinstance(model, PreTrainedModel) else os.fspath(model)
    return Origin(source, hub_arguments_among(arguments)).load(AutoTokenizer, TOKENIZER_MARKERS)


def fits(sides: Sequence[Side], limits: AwqOffloadConfig, device_map: Any) -> bool:
    """Returns whether both models fit where `device_map` has them; True for a map that names devices itself.

    A model of which some layers wait in RAM brings them to the device again for every window of text: with an
    accelerator, only its own memory counts.
    """
    if isinstance(device_map, Mapping) or device_map not in ("auto", "cpu", "none", None):
        return True
    if any(adapter_base(*side) is not None for side in sides):
        return True  # adapters run whole only
    size_bytes = sum(checkpoint_bytes(*side) for side in sides)
    device = default_execution_device()
    if device_map != "auto" or device.type == "cpu":
        return size_bytes <= RAM_SHARE * free_ram_bytes(limits)
    free_bytes, limit_bytes = accelerator_bytes(device)[0], limits.memory_limit_bytes(device)
    return size_bytes <= RAM_SHARE * min(free_bytes, limit_bytes or free_bytes)


@one_at_a_time()
def evaluate_streamed(
    sides: Sequence[Side], windows: Sequence[Window], limits: AwqOffloadConfig, model_class: Any, dtype: Any
) -> Evaluation:
    """Evaluates the first model, and compares it with the second, one decoder layer of each at a time.

    Raises:
        MemoryLimitError: not even one layer of each and one window fit.
        ConfigError: a model in memory is not in RAM.
    """
    register()
    for side in sides:
        if (base := adapter_base(*side)) is not None:
            raise ConfigError(
                f"{side[0]} is an adapter of {base}, which does not run one decoder layer at a time. Evaluate it whole "
                "(streamed=False, --no-streamed), or merge it and save the model."
            )
    device = execution_device_of(limits)
    with ExitStack() as stack:
        opened = [
            stack.enter_context(_opened(*side, limits, device, model_class, dtype, 2 * len(sides))) for side in sides
        ]
        gc.collect()  # what loading leaves behind grows with the number of layers
        release_freed()
        batch_tokens, prefetch = _budget(opened, windows, limits, device)
        for one in opened if not prefetch else ():
            one.onloader.stop_reading_ahead()
        bounds = {limited: limits.memory_limit_bytes(limited) for limited in (device, CPU)}
        for context in (at_most(bounds), large_blocks_apart(), ieee_products()):
            stack.enter_context(context)
        try:
            return evaluate_layer_by_layer(opened[0], opened[1] if opened[1:] else None, windows, batch_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"{device} ran out of memory: {first_line(error)} Set batch_tokens or window_tokens lower, "
                "prefetch=False, or raise max_memory."
            ) from error


@contextmanager
def _opened(
    model: Model,
    arguments: dict[str, Any],
    limits: AwqOffloadConfig,
    device: torch.device,
    model_class: Any,
    dtype: Any,
    copies: int,  # of hidden states that are held at once: what enters a layer and what leaves it, of each model
) -> Iterator[EvaluatedModel]:
    """Yields a model with its weights where they are: in RAM, or in the checkpoint's files."""
    hidden = HiddenStorage(None, HIDDEN_SHARE * free_ram_bytes(limits) / copies)
    if isinstance(model, PreTrainedModel):
        places = {parameter.device.type for parameter in model.parameters()}
        if places != {"cpu"} or getattr(model, "hf_device_map", None):
            raise ConfigError(
                f"A model in memory is streamed from RAM, and this {type(model).__name__} is on {sorted(places)}. Pass "
                "the checkpoint's name or folder, or move the model to the CPU."
            )
        with closing(EvaluatedModel(model, Onloader(model, device, None, limits.prefetch), hidden)) as evaluated:
            yield evaluated
        return
    with tempfile.TemporaryDirectory(prefix="hf_awq_offload-") as scratch:
        recipe = copy.copy(limits)
        lazy = load_on_meta(model, recipe, model_class, dtype, Path(scratch), arguments, to_quantize=False)
        quantizer = cast(AwqOffloadQuantizer, cast(Any, lazy).hf_quantizer)
        weights = detach_stored_weights(lazy, quantizer.source.opened)
        weights.take_experts_apart(lazy, quantizer.fused)
        onloader = Onloader(lazy, device, weights, limits.prefetch)
        with closing(EvaluatedModel(lazy, onloader, hidden)) as evaluated:
            yield evaluated


def _budget(
    opened: Sequence[EvaluatedModel], windows: Sequence[Window], limits: AwqOffloadConfig, device: torch.device
) -> tuple[int, bool]:
    """Returns the tokens of a micro-batch, and whether the next layers are read ahead.

    Raises:
        MemoryLimitError: one layer and one window don't fit.
    """
    sizes = [LayerSizes.of(candidate_layers(one.model).values(), device) for one in opened]
    layer_bytes, longest = max(size.weights + size.computed_copy for size in sizes), _longest(windows)
    per_token = max(size.activation_bytes_per_token for size in sizes)
    limit_bytes = limits.memory_limit_bytes(device)
    free_bytes = free_ram_bytes(limits) if device.type == "cpu" else accelerator_bytes(device)[0]
    most_bytes = free_bytes if limit_bytes is None else min(free_bytes, limit_bytes)
    most_bytes -= PROCESS_BYTES + _hidden_bytes(opened, windows, limits) if device.type == "cpu" else 0
    ends_bytes = sum(map(_head_bytes, opened)) + BLOCK_BYTES
    for prefetch in sorted({limits.prefetch, False}, reverse=True):
        held_bytes = layer_bytes + prefetch * sum(size.weights for size in sizes)
        needed_bytes = max(held_bytes + longest * per_token, ends_bytes)
        if needed_bytes <= most_bytes:
            break
    else:
        raise MemoryLimitError(
            f"Evaluating takes about {size_text(needed_bytes)} on {device}: one decoder layer and {longest} tokens, "
            f"or both heads. {size_text(most_bytes)} are available or allowed by max_memory. Set window_tokens "
            "(--window) lower, or raise max_memory."
        )
    if limits.batch_tokens is not None:
        return max(limits.batch_tokens, longest), prefetch
    usual = CPU_BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    share = 1.0 if limit_bytes is not None else ACCELERATOR_MEMORY_SHARE
    room_bytes = min(int(most_bytes * share), most_bytes - held_bytes)
    return max(longest, min(usual, room_bytes // per_token)), prefetch


def _hidden_bytes(opened: Sequence[EvaluatedModel], windows: Sequence[Window], limits: AwqOffloadConfig) -> int:
    """Returns the bytes of hidden states in RAM: two copies for each model, unless they are large and go to a file."""
    tokens = sum(window.token_ids.numel() for window in windows)
    widths = (one.model.config.get_text_config(decoder=True).hidden_size for one in opened)
    copies = [tokens * width * FP32_BYTES for width in widths for _ in ("in", "out")]
    return int(min(sum(copies), HIDDEN_SHARE * free_ram_bytes(limits)))


def _longest(windows: Sequence[Window]) -> int:
    return max(window.token_ids.shape[1] for window in windows)


def _head_bytes(evaluated: EvaluatedModel) -> int:
    """Returns the bytes of what turns hidden states into logits, which may be tied to the embeddings."""
    body = without_head(evaluated.model)
    inside = {id(part) for part in body.modules()}
    return sum(
        parameter.numel() * parameter.element_size()
        for part in evaluated.model.modules()
        if id(part) not in inside
        for parameter in part._parameters.values()
        if parameter is not None
    )
