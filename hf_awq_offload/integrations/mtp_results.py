"""Takes a layer for multi-token prediction out of the model once all layers are quantized, and keeps its tensors."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from ..checkpoint.stored_tensor import CarriedTensor, HeldTensor
from ..logs import get_logger
from ..report import QuantizationReport
from .lazy_loading import to_checkpoint_names
from .source_look import ModelSource

logger = get_logger(__name__)


def without_mtp(
    model: PreTrainedModel, source: ModelSource, report: QuantizationReport, is_streamed: bool
) -> ModelSource:
    """Returns a source that carries what the layer for multi-token prediction has become.

    Args:
        model: quantized; afterwards without that layer.
        source: what it was quantized from.
        report: says whether the layer was quantized.
        is_streamed: whether the journal has the layer's packed tensors, from where they are assembled.
    """
    if source.mtp is None:
        return source
    packed: dict[str, CarriedTensor] = {}
    if source.mtp.name not in {layer.name for layer in report.layers}:
        logger.warning(
            f"{source.mtp.name}, for multi-token prediction, stays in full precision despite mtp='quantize': what "
            f"enters it can't be computed from the outputs of the last decoder layer of {type(model).__name__}."
        )
        packed |= source.mtp.stored
    elif not is_streamed:
        layer = model.get_submodule(source.mtp.name)
        tensors = {f"{source.mtp.name}.{key}": value.detach() for key, value in layer.state_dict().items()}
        packed |= {name: HeldTensor(value) for name, value in to_checkpoint_names(model)(tensors).items()}
    source.mtp.remove()
    return replace(source, carried={**source.carried, **packed}, mtp=None)
