"""Prepares a model for the weights of a checkpoint that is quantized, and stays so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.layout_checks import read_headers
from ..checkpoint.opened import CONFIG_NAME, read_json
from ..checkpoint.safetensors import TensorPlace, tensor_places
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from .carrying import carried_names
from .loading import replace_linears
from .source_fit import fit
from .source_look import ModelSource


def prepare_quantized(
    model: PreTrainedModel,
    quantizer: HfQuantizer,
    config: AwqCheckpointConfig | PackedCheckpointConfig,
    files: Sequence[str] | None,
    skipped: list[str],
) -> ModelSource:
    """Replaces the model's linears by quantized ones; returns what of the checkpoint the model has no place for.

    Args:
        model: on the meta device.
        quantizer: its quantizer.
        config: the checkpoint's.
        files: the checkpoint's files.
        skipped: name patterns of linears that stay in full precision.

    Raises:
        CheckpointError: config, model and files contradict each other.
    """
    headers = read_headers(files)
    replace_linears(model, config, headers, skipped)
    if isinstance(config, PackedCheckpointConfig):
        model.config.quantization_config = config  # as saved, not as the library parses it
    if headers is None:
        return ModelSource()
    return ModelSource(carried=_carried(model, quantizer, headers, [Path(file) for file in files or ()]))


def _carried(
    model: PreTrainedModel, quantizer: HfQuantizer, names: Collection[str], files: Sequence[Path]
) -> dict[str, TensorPlace]:
    """Returns those of the checkpoint's tensors, given by name, that saving the model again is to keep.

    None if the model is a part of the checkpoint.
    """
    config = files[0].parent / CONFIG_NAME
    if not config.is_file() or read_json(config).get("model_type") != model.config.model_type:
        return {}
    if model.state_dict().keys() >= set(names):  # nothing is renamed, and nothing is left
        return {}
    kept = carried_names(fit(model, names, get_model_conversion_mapping(model, None, quantizer)).unplaced)
    places = {name: place for file in files if kept for name, place in tensor_places(file).items()}
    return {name: places[name] for name in kept}
