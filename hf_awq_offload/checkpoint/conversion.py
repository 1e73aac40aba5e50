"""Converts a 4-bit checkpoint to another format, exactly: file by file, with one linear in memory at a time.

    gemm, gemv, gemv_fast, llm-awq, compressed-tensors  ->  gemm, gemv, compressed-tensors

Integers, zero points and scales keep their values. What the other format can't hold is refused before anything is
written. The exception: only the conversion itself finds scales that lose bits in the new dtype; it then leaves nothing
behind. All other tensors are copied byte by byte. Files beside the weights come along unchanged (companion_files.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..errors import CheckpointError, ConfigError, StorageError
from ..formats.awq import BITS, COLUMNS_PER_WORD, PackedWeight
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.awq_variants import gemv_words, to_gemm, to_gemv
from ..formats.compressed_tensors_config import META_ATTRIBUTE, PackedCheckpointConfig
from ..formats.conversion import exact, to_awq, to_pack_quantized
from ..formats.dtypes import SPELLINGS
from ..formats.grid import SCALE_DTYPE, Grid
from ..formats.layouts import AWQ_FORMATS, COMPRESSED_TENSORS, GEMM, GEMV, names_in, tensors_of
from ..formats.pack_quantized import PackQuantizedWeight
from ..logs import get_logger
from .companion_copies import companion_states, copy_all_companions
from .config_file import completed, text_of
from .dense_modules import DenseModules, dense_modules
from .file_states import blaming_changes
from .inspection import inspect_checkpoint
from .layout_checks import FLOAT_DTYPES
from .opened import CONFIG_NAME, Checkpoint, open_checkpoint, read_json
from .output_folder import output_folder
from .renaming import Renaming
from .safetensors import INDEX_NAME, tensor_places, writing
from .work_folder import move_into_place, work_folder

logger = get_logger(__name__)

TARGETS = (GEMM, GEMV, COMPRESSED_TENSORS)


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    source_format: str
    format: str
    linears: int
    size_bytes: int


def convert_checkpoint(
    source: Path,
    out_dir: Path,
    to: str,
    *,
    scale_dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes the checkpoint in `source` to `out_dir` in another format.

    Args:
        source: folder of a quantized checkpoint.
        out_dir: the new folder, which appears once it is complete.
        to: "gemm", "gemv" or "compressed-tensors".
        scale_dtype: dtype of the scales in compressed-tensors; by default the model's.
        overwrite: replace an existing folder.

    Raises:
        CheckpointError: `source` is damaged or not 4-bit, or the other format can't hold it exactly.
        ConfigError: `to` is no such format, or `out_dir` may not be replaced, see `output_folder`.
        StorageError: a file can't be written.
    """
    if to not in TARGETS:
        raise ConfigError(f"to is {to!r}; pass one of {', '.join(map(repr, TARGETS))}.")
    kept = {"the source itself": source}
    target = output_folder(out_dir, overwrite, kept=kept, sources=[source])
    states = companion_states([source], apart_from=[target])
    states.add(sorted(source.glob("*.safetensors")))
    checkpoint = open_checkpoint(source)
    job = _Conversion(checkpoint, to, scale_dtype)
    with work_folder(target) as work:
        output_folder(target, overwrite, kept=kept, sources=[source])  # a killed run's predecessor may be back
        assembled = work / "checkpoint"
        try:
            with blaming_changes(states):
                assembled.mkdir()
                job.write(assembled)
                copy_all_companions(source, assembled, same_model=True)
                states.require_unchanged()
        except OSError as error:
            raise StorageError(
                f"The converted checkpoint can't be written to {work}: {error}. Nothing is left of it: make room or "
                "correct the permissions, and repeat the call."
            ) from error
        size_bytes = sum(file.stat().st_size for file in assembled.glob("*.safetensors"))
        move_into_place(assembled, target, work, [source])
    return Converted(checkpoint.format, to, len(checkpoint.linears), size_bytes)


class _Conversion:
    """One conversion. The constructor refuses what the headers show to be impossible."""

    def __init__(self, checkpoint: Checkpoint, to: str, scale_dtype: torch.dtype | None):
        self.checkpoint, self.to = checkpoint, to
        if not checkpoint.linears:
            raise CheckpointError(
                f"{checkpoint.folder} is not quantized, or has no packed linears (format: {checkpoint.format}); "
                f"expected one of the formats {', '.join(AWQ_FORMATS)}, {COMPRESSED_TENSORS}."
            )
        if checkpoint.format == to:
            raise CheckpointError(f"{checkpoint.folder} is in the format {to} already; nothing was written.")
        sound = inspect_checkpoint(checkpoint.folder, headers_only=True)
        if sound.is_damaged:
            damage = next(finding for finding in sound.findings if finding.is_damage)
            raise CheckpointError(f"{checkpoint.folder} is damaged: {damage.where}: {damage.what}")
        self.facts = {facts.name: facts for facts in sound.linears}
        self.choice = self._one_grid()
        model_dtype = _model_dtype(checkpoint)
        self.scale_dtype = (scale_dtype or model_dtype) if to == COMPRESSED_TENSORS else SCALE_DTYPE
        self._require_shapes()

    def _one_grid(self) -> Any:
        """The grid of all linears."""
        choices = {self.checkpoint.choice(linear) for linear in self.checkpoint.linears}
        if any(choice is None or choice.bits != BITS for choice in choices) or len(choices) > 1:
            bits = sorted({choice.bits for choice in choices if choice is not None})
            raise CheckpointError(
                f"{self.checkpoint.folder} has {len(choices)} grids, with {' and '.join(map(str, bits))} bits; AWQ "
                "checkpoints hold one grid of 4 bits for all linears. It can't be converted exactly."
            )
        return choices.pop()

    def _require_shapes(self) -> None:
        for facts in self.facts.values():
            if self.to != COMPRESSED_TENSORS and facts.out_features % COLUMNS_PER_WORD:
                raise CheckpointError(
                    f"{facts.name} has {facts.out_features} output channels; the AWQ layouts hold multiples of "
                    f"{COLUMNS_PER_WORD}. It can't be converted exactly."
                )
            if self.to == GEMV:
                gemv_words(facts.in_features, facts.group_size)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Writes all safetensors files, the index and config.json."""
        places = self.checkpoint.places
        consumed = {name for linear in self.facts for name in self.checkpoint.tensors_of(linear).values()}
        integers = names_in(self.checkpoint.format).integers
        home = {linear: places[f"{linear}.{integers}"].file for linear in self.facts}
        weight_map: dict[str, str] = {}
        for file in sorted({place.file for place in places.values()}):
            kept = {name: place for name, place in places.items() if place.file == file and name not in consumed}
            linears = [linear for linear in self.facts if home[linear] == file]
            tensors = {name: (place.dtype, place.shape) for name, place in kept.items()}
            for linear in linears:
                tensors |= self._announced(linear)
            with writing(folder / file.name, tensors) as out:
                for name, place in kept.items():
                    out.copy(name, place)
                for linear in linears:
                    for name, tensor in self._converted(linear).items():
                        out.write(name, tensor)
            weight_map |= dict.fromkeys(tensors, file.name)
        self._write_index(folder, weight_map)
        (folder / CONFIG_NAME).write_text(text_of(completed(self._config())), encoding="utf-8")

    def _announced(self, linear: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtypes and shapes of the linear's new tensors, by their names in the file."""
        facts = self.facts[linear]
        padded_groups = None
        if self.to == GEMV:
            padded_groups = gemv_words(facts.in_features, facts.group_size) * COLUMNS_PER_WORD
        grid = Grid(facts.bits, facts.group_size, facts.zero_point)
        tensors = tensors_of(
            self.to, facts.in_features, facts.out_features, grid, self.scale_dtype, padded_groups=padded_groups
        )
        return {f"{linear}.{name}": (SPELLINGS[layout.dtype], layout.shape) for name, layout in tensors.items()}

    def _converted(self, linear: str) -> dict[str, Tensor]:
        facts, config = self.facts[linear], self.checkpoint.quantization
        stored = {name: self.checkpoint.read(tensor) for name, tensor in self.checkpoint.tensors_of(linear).items()}
        try:
            if isinstance(config, AwqCheckpointConfig):
                gemm = to_gemm(config.version, PackedWeight(**stored), facts.in_features // facts.group_size)
                if self.to != COMPRESSED_TENSORS:
                    gemm = gemm._replace(scales=exact(gemm.scales, self.scale_dtype))
            else:
                gemm = to_awq(PackQuantizedWeight(**({"weight_zero_point": None} | stored)))
            new: Any = gemm if self.to == GEMM else to_gemv(gemm) if self.to == GEMV else None
            if new is None:
                new = to_pack_quantized(gemm, facts.zero_point, self.scale_dtype)
        except CheckpointError as error:
            hint = ""
            if self.to == COMPRESSED_TENSORS and self.scale_dtype == torch.bfloat16:
                hint = " Or store the scales in another dtype than the model's: float16 (--scale-dtype float16)."
            raise CheckpointError(f"{linear}: {error}{hint}") from error
        return {f"{linear}.{name}": value for name, value in new._asdict().items() if value is not None}

    def _write_index(self, folder: Path, weight_map: dict[str, str]) -> None:
        path = self.checkpoint.folder / INDEX_NAME
        if not path.exists():
            return
        index = read_json(path)
        sizes = (
            place.end - place.start for file in folder.glob("*.safetensors") for place in tensor_places(file).values()
        )
        metadata = index.get("metadata")
        index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": sum(sizes)}
        index["weight_map"] = weight_map
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")

    # -- config.json ---------------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        config = {name: value for name, value in self.checkpoint.config.items() if name != "compression_config"}
        quantization = self.checkpoint.quantization
        if isinstance(quantization, AwqCheckpointConfig) and self.to != COMPRESSED_TENSORS:
            fields = dict(config["quantization_config"])  # fields that another tool has added stay
            changed = {name: self.to for name in ("format", "checkpoint_format") if name in fields}
            return config | {"quantization_config": fields | changed | {"version": self.to}}
        if isinstance(quantization, AwqCheckpointConfig):
            if quantization.meta:
                config[META_ATTRIBUTE] = quantization.meta
            return config | {"quantization_config": self._packed_config().to_dict()}
        new = AwqCheckpointConfig(
            group_size=self.choice.group_size,
            zero_point=self.choice.zero_point,
            version=self.to,
            modules_to_not_convert=self._modules().awq_entries() or None,
            meta=config.pop(META_ATTRIBUTE, {}),
        )
        return config | {"quantization_config": new.to_dict()}

    def _packed_config(self) -> PackedCheckpointConfig:
        modules = self._modules()
        grids = dict.fromkeys([*modules.quantized, *self.facts], self.choice)
        return PackedCheckpointConfig.of_linears(grids, modules.full_names - grids.keys())

    def _modules(self) -> DenseModules:
        """What is packed and what is dense: as the model has it, or without a model, as the files have it."""
        model, renaming = self._model()
        if model is not None:
            packed = {linear[:end] for linear in self.facts for end in _ends_of_parts(linear)}  # or around packed ones
            modules = dense_modules(model, renaming, lambda name, _: renaming.name_in_checkpoint(name) in packed)
            of_experts = {name: name for name in self.facts.keys() - modules.quantized.values()}
            return replace(modules, quantized={**modules.quantized, **of_experts})
        matrices = {
            name.removesuffix(".weight")
            for name, place in self.checkpoint.places.items()
            if name.endswith(".weight") and len(place.shape) == 2 and "embed" not in name
        }
        dense = {name: name for name in matrices | {"lm_head"}}
        return DenseModules(dense, {}, {name: name for name in self.facts}, frozenset({"lm_head"}))

    def _model(self) -> tuple[PreTrainedModel | None, Any]:
        """The model on the meta device, or None if transformers can't build it, and its renaming."""
        if not hasattr(self, "_built"):
            self._built: tuple[PreTrainedModel | None, Any] = (None, None)
            try:
                config = AutoConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=False)  # None would ask
                config.__dict__.pop("quantization_config", None)
                model_class = getattr(transformers, (config.architectures or ["?"])[0])
                with torch.device("meta"):
                    model = model_class._from_config(config)
                self._built = (model, Renaming(get_model_conversion_mapping(model, add_legacy=False)))
            except (AttributeError, ValueError, KeyError, ImportError, OSError) as error:
                logger.warning(
                    f"transformers can't build the model ({error}); the names in the files tell which linears are in "
                    "full precision."
                )
        return self._built


def _ends_of_parts(name: str) -> list[int]:
    """The lengths of `name` and of the names of all modules that it is in."""
    return [place for place, character in enumerate(f"{name}.") if character == "."]


def _model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The model's dtype in config.json; fp16 if it is missing or no dtype for scales."""
    text = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float16"
    dtype = getattr(torch, str(text).removeprefix("torch."), None)
    return dtype if dtype in FLOAT_DTYPES else torch.float16
