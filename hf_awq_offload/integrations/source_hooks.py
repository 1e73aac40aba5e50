"""Has transformers read a source through this package.

transformers maps all files of a checkpoint into memory while it loads, and reads every tensor, even where all of them
are to stay on the disk. What is quantized it reads as it is stored. `read_through_sources` puts a reader in its place,
which serves calls with a recipe only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from ..checkpoint.safetensors import tensor_places
from ..checkpoint.source import Source
from ..config import QUANT_METHOD, AwqOffloadConfig
from .load_call import current_call
from .source_fit import SourceFit
from .source_reading import SourceReading


def read_source(source: Source, found: SourceFit, model: PreTrainedModel, is_lazy: Callable[[], bool]) -> None:
    """Has transformers read a source through this package from here on, in the current call.

    Args:
        source: the source.
        found: how its tensors correspond to the model's.
        model: the model that is loaded.
        is_lazy: whether weights stay on the disk; asked when transformers reads.
    """
    call = current_call()
    if call is not None:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        as_stored = {stored for name, stored in found.placed.items() if name in parameters}
        call.reading = SourceReading(source, as_stored, is_lazy)


def end_reading() -> None:
    """Leaves to transformers whatever it reads from here on, such as adapters.

    Raises:
        CheckpointError: it has read a quantized source as it is stored, or a file was changed meanwhile.
    """
    call = current_call()
    if call is not None and call.reading is not None:
        call.reading.require_use()
        call.reading.source.states.require_unchanged()
        call.reading = None


def read_through_sources() -> None:
    """Puts this module's reader into transformers; call it once."""
    patched: Any = modeling_utils
    patched.safe_open = _safe_open(patched.safe_open)
    patched.accelerate_disk_offload = _accelerate_disk_offload(patched.accelerate_disk_offload)
    patched.get_hf_quantizer = _get_hf_quantizer(patched.get_hf_quantizer)


def _safe_open(original: Callable[..., Any]) -> Callable[..., Any]:
    def safe_open(file: str, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return original(file, *args, **kwargs)
        if call.reading is None:  # transformers looks for a dtype
            tensor_places(file)  # says what is wrong with a damaged file
        elif call.reading.serves(file):
            return call.reading.open(file)
        return original(file, *args, **kwargs)

    return safe_open


def _accelerate_disk_offload(original: Callable[..., Any]) -> Callable[..., Any]:
    def accelerate_disk_offload(
        model: Any, folder: Any, files: Any, device_map: Any, sharded_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = current_call()
        if call is not None and call.reading is not None and call.reading.source.format is not None:
            names = {name: str(stored.file.name) for name, stored in call.reading.source.tensors.items()}
            sharded_metadata = {"weight_map": names}
        return original(model, folder, files, device_map, sharded_metadata, *args, **kwargs)

    return accelerate_disk_offload


def _get_hf_quantizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hides the source's own quantization, which transformers refuses beside a recipe, and keeps it for us."""

    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is not None and isinstance(quantization_config, AwqOffloadConfig):
            for part in (config, config.get_text_config(decoder=True)):
                found = getattr(part, "quantization_config", None)
                if found is not None and _method(found) != QUANT_METHOD:
                    call.quantization = found if isinstance(found, dict) else found.to_dict()
                    del part.quantization_config
        return original(config, quantization_config, *args, **kwargs)

    return get_hf_quantizer


def _method(quantization: Any) -> Any:
    found = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return getattr(found, "value", found)
