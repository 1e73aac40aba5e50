"""One look at the checkpoint that is to be quantized, before any of its weights is loaded.

The first look is at the files of a folder, before transformers reads its config. The second one, once the model stands
on the meta device, is at the files that transformers has chosen, and compares them with the model. Both read headers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..checkpoint.opened import CONFIG_NAME, read_json, weight_map
from ..checkpoint.pickled import pickled_shapes
from ..checkpoint.source import ADAPTER_CONFIG_NAME, Source, fields_beside, open_source
from ..checkpoint.stored_tensor import CarriedTensor
from ..config import AwqOffloadConfig
from ..dtype_names import wrong_dtype
from ..errors import AwqOffloadError, CheckpointError, ConfigError, ModelStructureError
from ..formats.source import SourceFormat
from ..logs import get_logger
from ..model.mtp_layer import MtpLayer
from .carrying import carried, carried_names
from .config_look import NEEDS_CODE, UNKNOWN_TYPE, require_readable_config
from .load_call import LoadCall, current_call, is_only_opening
from .mtp_matching import place_mtp_layer
from .source_fit import SourceFit, fit, require_all_weights
from .source_hooks import read_source

logger = get_logger(__name__)

IMAGE_TEXT = "Load it with AutoModelForImageTextToText (`quantize(..., model_class=...)`, or --image-text)"


# -- before transformers reads the config ------------------------------------------------------------------------------


def look_at_folder(call: LoadCall) -> None:
    """Checks the files of a checkpoint in a folder; does nothing for a name on the Hub, whose files are not here yet.

    Raises:
        ConfigError: the dtype is none.
        CheckpointError: there are no weights, a file is missing or damaged, config.json says nonsense, or the
            quantization can't be undone.
        ModelStructureError: the folder holds adapters, and the weights are to stay on the disk.
    """
    check_dtype(call.arguments.get("dtype", call.arguments.get("torch_dtype")))
    folder = Path(call.source) / str(call.arguments.get("subfolder") or "")
    if not call.source or not folder.is_dir() or call.arguments.get("gguf_file"):
        return
    try:
        holds_adapters = (folder / ADAPTER_CONFIG_NAME).exists()
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error.strerror}. Correct the folder's permissions.") from error
    if holds_adapters:
        if call.is_streamed:
            refuse_adapters(call.source)
        if not (folder / CONFIG_NAME).exists():
            return  # transformers loads the model that they adapt
    if not (folder / CONFIG_NAME).exists():
        if "config" in call.arguments:
            return
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}; expected the folder of a checkpoint.")
    if "transformers_weights" in read_json(folder / CONFIG_NAME):
        return
    files, index = files_in(folder, call.arguments.get("variant"), call.arguments.get("use_safetensors"))
    if files and files[0].suffix == ".safetensors":
        call.opened = open_source(files, fields_beside(files[0]), index)
        if not call.arguments.get("trust_remote_code") and "config" not in call.arguments:
            require_readable_config(folder, len(call.opened.tensors), call.is_of_auto_class)


def check_dtype(dtype: Any) -> None:
    """Raises ConfigError unless `dtype` is a dtype for weights, its name, a dict of such, or None."""
    values = list(dtype.values()) if isinstance(dtype, dict) else [dtype]
    for value in values:
        if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
            continue
        remedy = wrong_dtype(value if isinstance(value, str) else str(value))
        if remedy is not None:
            raise ConfigError(f"dtype is {value!r}; {remedy}.")


def refuse_adapters(source: str) -> None:
    """Raises ModelStructureError: a checkpoint of adapters can't be quantized from disk to disk."""
    raise ModelStructureError(
        f"{source} holds adapters ({ADAPTER_CONFIG_NAME}), not a model; expected a full-precision checkpoint. Merge "
        "the adapter first: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(folder), "
        "then quantize that folder."
    )


def files_in(folder: Path, variant: str | None, use_safetensors: bool | None) -> tuple[list[Path], Path | None]:
    """Returns the files of a folder that hold the weights and their index, in transformers' order of preference.

    Raises:
        CheckpointError: there are none, or one that the index names is missing.
    """
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME] if use_safetensors is not False else []
    names += [] if use_safetensors else [WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    for name in names:
        first, _, suffixes = name.partition(".")
        file = folder / (f"{first}.{variant}.{suffixes}" if variant else name)
        if variant and name.endswith("index.json"):
            first, _, suffixes = name.rpartition(".index.json")[0].partition(".")
            file = folder / f"{first}.{suffixes}.index.{variant}.json"
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file], None
        files = [folder / shard for shard in sorted(set(weight_map(file).values()))]
        missing = [shard.name for shard in files if not shard.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {missing[0]}, one of {len(files)} files that {file.name} names"
                f"{f', and {len(missing) - 1} more' if missing[1:] else ''}. The download is incomplete: download them."
            )
        return files, file
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} holds no weights: expected one of {', '.join(names)}"
        f"{f' with the variant {variant!r}' if variant else ''}; found {there}."
    )


def explain_auto_class(call: LoadCall, error: ValueError) -> None:
    """Explains why an Auto class does not load a checkpoint; transformers' own messages list 200 classes.

    Raises:
        ModelStructureError: transformers, or this class, does not know the model's type.
        CheckpointError: the checkpoint needs code of its own, which may not run.
    """
    if isinstance(error, AwqOffloadError):
        return
    unknown = UNKNOWN_TYPE.search(str(error))
    if unknown is not None:
        raise ModelStructureError(
            f"{call.source} is of the type {unknown[1]!r}, which transformers {transformers.__version__} does not "
            "know. Upgrade transformers; if the checkpoint comes with code of its own, read the code, then pass "
            "trust_remote_code=True (--trust-remote-code)."
        ) from error
    if NEEDS_CODE in str(error):
        raise CheckpointError(
            f"{call.source} comes with code of its own, which runs only if you allow it. Read the code, then pass "
            "trust_remote_code=True (--trust-remote-code)."
        ) from error
    if not str(error).startswith("Unrecognized configuration class"):
        return
    config = AutoConfig.from_pretrained(call.source, **call.hub_arguments)
    found = f"{call.source} is of the type {config.model_type}"
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        why = f", an image-text model, which the class for text models does not load. {IMAGE_TEXT}."
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        why = ", a text model, which this class does not load. Use AutoModelForCausalLM (leave out --image-text)."
    elif getattr(config, "is_encoder_decoder", False):
        why = ", an encoder-decoder model; expected a decoder-only model, such as Llama."
    else:
        why = ", which has no class that generates text; expected a decoder-only model, such as Llama."
    raise ModelStructureError(found + why) from error


# -- once the model stands on the meta device --------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """The checkpoint that a model is quantized from."""

    opened: Source | None = None
    """None: there is none, or its files are not in the safetensors format."""
    carried: Mapping[str, CarriedTensor] = field(default_factory=dict)
    """What the model has no place for and the result is to hold all the same, by its name in the checkpoint."""
    mtp: MtpLayer | None = None
    """The decoder layer for multi-token prediction that stands in the model until it is quantized."""

    @property
    def names(self) -> Collection[str]:
        """Names of the checkpoint's tensors, as far as they are known."""
        return () if self.opened is None else self.opened.tensors.keys()

    @property
    def format(self) -> SourceFormat | None:
        """How the checkpoint is quantized; None: it is in full precision."""
        return None if self.opened is None else self.opened.format

    @property
    def format_name(self) -> str | None:
        """The format's name; None: the checkpoint is in full precision."""
        return None if self.format is None else self.format.name


def look_at_source(
    model: PreTrainedModel,
    quantizer: HfQuantizer,
    recipe: AwqOffloadConfig,
    checkpoint_files: Sequence[str] | None,
    is_lazy: Callable[[], bool],
    take_apart: Callable[[Collection[str]], None],
) -> ModelSource:
    """Opens the files that transformers has chosen, compares them with the model, and has transformers read them so.

    Args:
        model: on the meta device.
        quantizer: its quantizer.
        recipe: says what may be quantized, and what becomes of tensors that the model has no place for.
        checkpoint_files: the files.
        is_lazy: whether weights stay on the disk; asked when transformers reads.
        take_apart: replaces fused experts of the model by those that the checkpoint holds one by one; is given the
            parameters that the checkpoint holds as the model does.

    Raises:
        CheckpointError: a file is damaged, the quantization can't be undone, or weights are missing.
        ConfigError: quantizing would round a second time, and the recipe does not want that.
        ModelStructureError: the class loads a part of the checkpoint only.
    """
    call = current_call()
    if call is not None:
        call.is_built = True
    files = [Path(file) for file in checkpoint_files or ()]
    key_mapping = None if call is None else call.arguments.get("key_mapping")

    def conversions() -> list[Any]:
        return get_model_conversion_mapping(model, key_mapping, quantizer)

    def fitted(names: Iterable[str]) -> SourceFit:
        names = list(names)
        whole = fit(model, names, conversions())
        take_apart(whole.placed.keys())
        return fit(model, names, conversions())

    if not files:
        take_apart(())
        return ModelSource()
    if any(file.suffix != ".safetensors" for file in files):
        return _look_at_pickled(model, files, fitted)
    source = _opened(call, files)
    if is_lossy(source.format) and not recipe.from_quantized:
        raise ConfigError(
            f"The checkpoint is quantized already ({source.format.name}), and quantizing it adds a second loss to the "
            "first. Quantize the full-precision checkpoint, or pass from_quantized=True (--from-quantized) if you want "
            "this."
        )
    found = fitted(source.tensors)
    _require_whole_model(model, files[0], found)
    require_all_weights(model, {name: stored.shape for name, stored in source.tensors.items()}, found)
    mtp = None
    if recipe.mtp == "quantize":
        mtp, found = place_mtp_layer(model, source, found, conversions())
    read_source(source, found, model, is_lazy)
    if is_only_opening():
        return ModelSource(source)
    _say_what_is_unused(source)
    return ModelSource(source, carried(model, recipe, source, found), mtp)


def _look_at_pickled(
    model: PreTrainedModel, files: Sequence[Path], fitted: Callable[[Iterable[str]], SourceFit]
) -> ModelSource:
    """Looks at files that PyTorch has pickled; what the model has no place for can't be carried over from them."""
    if any(file.suffix != ".bin" for file in files):
        fitted(())
        return ModelSource()
    shapes = pickled_shapes(files, fields_beside(files[0]))
    found = fitted(shapes)
    _require_whole_model(model, files[0], found)
    require_all_weights(model, shapes, found)
    if left := carried_names(found.unplaced):
        logger.warning(
            f"{type(model).__name__} has no place for {len(left)} tensors of the checkpoint, such as {left[0]}. The "
            "result lacks them: they can be carried over from safetensors files, not from .bin files."
        )
    return ModelSource()


def _say_what_is_unused(source: Source) -> None:
    scales = [name for name in source.unused if "scale" in name.rpartition(".")[2]]
    if scales:
        logger.warning(
            f"Left out: {len(scales)} scales of activations or of the KV cache, such as {scales[0]}. The result "
            "quantizes weights alone."
        )


def is_lossy(format: SourceFormat | None) -> TypeGuard[SourceFormat]:
    """Returns whether a source's quantization has lost so much that another one is to be asked for."""
    return format is not None and format.bits < 8 and not format.is_native


def _opened(call: LoadCall | None, files: list[Path]) -> Source:
    if call is not None and call.opened is not None and list(call.opened.files) == files:
        return call.opened
    fields = fields_beside(files[0]) or (None if call is None else call.quantization)
    return open_source(files, fields, _index_of(files))


def _index_of(files: Sequence[Path]) -> Path | None:
    """Returns the index that names these files, if there are several."""
    names = {file.name for file in files}
    for index in sorted(files[0].parent.glob("*.safetensors.index*.json")) if len(files) > 1 else ():
        if set(weight_map(index).values()) <= names:
            return index
    return None


def _require_whole_model(model: PreTrainedModel, file: Path, found: SourceFit) -> None:
    """Raises ModelStructureError if the model is the text decoder of an image-text model: the rest would be lost."""
    path = file.parent / CONFIG_NAME
    if not found.unplaced or not path.is_file():
        return
    config, own = read_json(path), model.config.model_type
    whole, parts = config.get("model_type"), [part for part in config.values() if isinstance(part, dict)]
    if whole not in (None, own) and any(part.get("model_type") == own for part in parts):
        raise ModelStructureError(
            f"{type(model).__name__} is the text decoder of an image-text model ({whole}): {len(found.unplaced)} "
            f"tensors, such as {found.unplaced[0]}, would be lost. {IMAGE_TEXT}; for the text decoder alone, save it "
            "in full precision first, and quantize that."
        )
