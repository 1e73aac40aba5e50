"""One behaviour that every architecture must show, run over every model type, and a summary of its folds."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from shrink import text_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from hf_awq_offload import AwqLinear, AwqOffloadConfig
from hf_awq_offload.integrations import quantizer
from hf_awq_offload.model.experts import ExpertPart, expert_parts
from hf_awq_offload.pipeline.layer_context import LayerContext
from hf_awq_offload.pipeline.loop import quantize_layers
from hf_awq_offload.pipeline.stack_rounding import RoundingData, Stack, StackOutcome

GROUP_SIZE = 32
SAME_WEIGHTS_TOLERANCE = 1e-5
"""Deviation of logits between models of equal weights: kernels differ in the last bit with memory alignment."""
IDENTITY_TOLERANCE = 2e-4
"""Relative deviation of logits that fp32 rounding may cause in a model whose weights are only rescaled."""


def recipe(**changes: Any) -> AwqOffloadConfig:
    """Returns a recipe with few short sequences and few candidates, to test structure, not quality."""
    tokens = [row.tolist() for row in text_ids(4, 32)]
    defaults = {"dataset": tokens, "group_size": GROUP_SIZE, "n_samples": 4, "max_seq_len": 32, "n_grid": 4}
    return AwqOffloadConfig(**defaults | changes)


Inputs = dict[str, Any]
"""Arguments of a forward pass."""

TEXT: Inputs = {"input_ids": text_ids(1, 24, seed=5)}


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: list[Inputs]) -> Tensor:
    """Returns the logits on fixed inputs, one after the other; (tokens, vocabulary)."""
    return torch.cat([model(**each, use_cache=False).logits.flatten(0, -2) for each in inputs])


def load(model_class: Any, path: Path, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads the model in fp32; also returns what transformers says of missing, unexpected and mismatched weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **kwargs)


def save(model: PreTrainedModel, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def assert_all_loaded(info: dict[str, Any]) -> None:
    wrong = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
    assert not wrong, wrong


def assert_same_tensors(model: nn.Module, other: nn.Module) -> None:
    """Asserts that all saved parameters and buffers are equal, bit for bit."""
    tensors, others = model.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    differing = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    assert not differing, differing[:5]


@contextmanager
def no_rounding() -> Iterator[None]:
    """Folds scales as usual inside the context, but leaves linears dense: the identity is the rounder."""

    def keep_dense(context: LayerContext, stack: Stack, data: RoundingData) -> tuple[list[nn.Linear], StackOutcome]:
        linears = []
        for scaled in stack:
            linear = copy.copy(context.linear(scaled.name))
            own = {"weight": scaled.rows(slice(None)).to(linear.weight.dtype), "bias": scaled.bias}
            linear._parameters = {
                name: None if value is None else nn.Parameter(value, requires_grad=False) for name, value in own.items()
            }
            linears.append(linear)
        return linears, StackOutcome()

    with mock.patch.object(quantizer, "quantize_layers", partial(quantize_layers, rounder=keep_dense)):
        yield


def relative_change(output: Tensor, reference: Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


def check(
    model: PreTrainedModel, folder: Path, inputs: list[Inputs] | None = None, dataset: list[Any] | None = None
) -> dict[str, Any]:
    """Quantizes `model` from a checkpoint, saves, reloads, compares; then again without rounding. Returns `summary`.

    Args:
        model: in full precision.
        folder: for checkpoints.
        inputs: what models are compared on; by default one text.
        dataset: calibration data; by default texts.
    """
    inputs = inputs or [TEXT]
    changes = {} if dataset is None else {"dataset": dataset}
    model_class: Any = type(model)
    if not isinstance(model.config, model_class.config_class):  # of another type; only an Auto class keeps the config's
        is_image_text = type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model_class = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    original = logits(model, inputs)
    source = save(model, folder / "original")
    del model

    quantized, _ = load(model_class, source, quantization_config=recipe(**changes))
    found = summary(quantized)
    assert found["quantized"] > 0
    output = logits(quantized, inputs)
    assert torch.isfinite(output).all()
    assert not torch.equal(output, original)
    saved = save(quantized, folder / "quantized")
    reloaded, info = load(model_class, saved)
    assert_all_loaded(info)
    assert sum(isinstance(module, AwqLinear) for module in reloaded.modules()) == found["quantized"]
    assert_same_tensors(quantized, reloaded)
    assert relative_change(logits(reloaded, inputs), output) < SAME_WEIGHTS_TOLERANCE

    with no_rounding():
        folded, _ = load(model_class, source, quantization_config=recipe(**changes))
    assert relative_change(logits(folded, inputs), original) < IDENTITY_TOLERANCE
    return found


def summary(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what was quantized and folded, per layer class: consumers -> producer, "*" for layers and experts."""
    report = model.hf_quantizer.report
    folds: dict[str, dict[str, str | None]] = {}
    for layer in report.layers:
        of_class = folds.setdefault(type(model.get_submodule(layer.name)).__name__, {})
        parts = expert_parts(model.get_submodule(layer.name))
        for group in layer.groups:
            consumers = ", ".join(dict.fromkeys(_starred(name, parts) for name in group.consumers))
            of_class[consumers] = None if group.producer is None else _starred(group.producer, parts)
    groups = [group for layer in report.layers for group in layer.groups]
    left_out: dict[str, set[str]] = {}
    for name, reason in report.left_out.items():
        left_out.setdefault(reason, set()).add(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    return {
        "folds": {name: dict(sorted(of_class.items())) for name, of_class in sorted(folds.items())},
        "quantized": sum(len(group.consumers) for group in groups),
        "scaled": sum(len(group.consumers) for group in groups if group.producer is not None),
        "left_out": {reason: sorted(names) for reason, names in sorted(left_out.items())},
    }


def _starred(name: str, parts: dict[str, ExpertPart]) -> str:
    return parts[name].family if name in parts else name
