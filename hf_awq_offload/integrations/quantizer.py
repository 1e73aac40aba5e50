"""The plugin: transformers' `HfQuantizer` interface on one side, the pipeline on the other. No maths.

Two jobs behind one class, told apart by `pre_quantized`:

- a full-precision checkpoint and an `AwqOffloadConfig`: weights are loaded to the CPU, calibrated, quantized, and the
  small model is dispatched as the caller's `device_map` asked;
- an AWQ checkpoint: its linears become `AwqLinear` before the weights are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..calibration.dataset import CalibrationSet, load_calibration_set
from ..calibration.forward_pass import forward_arguments, placeholder_ids
from ..checkpoint.layout_checks import read_headers
from ..checkpoint.renaming import Renaming
from ..config import AwqOffloadConfig
from ..errors import CalibrationDataError, CheckpointError, ConfigError, ModelStructureError
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from ..formats.grid_choice import check_that_all_match
from ..logs import get_logger
from ..model.decoder_layers import candidate_layers
from ..model.experts import (
    conversions_without_merging,
    fused_names,
    is_fused_experts,
    original_projections,
    router_linears,
    unfused,
)
from ..model.linears import is_linear, linears_in
from ..nn.awq_linear import AwqLinear
from ..nn.quantized_linear import QuantizedLinear
from ..nn.registry import linear_class
from ..offload.offload_folder import OffloadFolder
from ..offload.onloader import move_hook
from ..offload.stored_weights import StoredWeights
from ..pipeline.layer_quantization import Undo
from ..pipeline.loop import quantize_layers
from ..pipeline.run_storage import ToCheckpoint, Workplace, chosen_offload, open_workplace
from ..report import QuantizationReport
from ..reporting.document import facts_of
from ..reporting.files import prepare_folder, write_report
from . import peft
from .dispatching import DeviceMap, dispatch, dispatch_with_disk, offload_folder_of
from .hub import accompany
from .lazy_loading import detach_stored_weights, is_only_loading, stays_on_disk
from .loading import ToGemm, replace_linears, to_gemm_converter
from .saving import checkpoint_config, config_of_result, dense_in_spite, meta_of

logger = get_logger(__name__)


class AwqOffloadQuantizer(HfQuantizer):
    """See the module. `report` holds what the last quantization did."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            if isinstance(quantization_config, AwqOffloadConfig):
                raise CheckpointError(
                    "The checkpoint's config.json holds a recipe (quant_method 'awq_offload'), which no finished "
                    "checkpoint does; it was interrupted or edited. Quantize the original again."
                )
            self.quantization_config = checkpoint_config(quantization_config)
        self.final_device_map: DeviceMap | None = None
        self.calibration: CalibrationSet | None = None
        self.left_out: dict[str, str] = {}
        self.quantizable: frozenset[str] = frozenset()
        self.report: QuantizationReport | None = None
        self.planned: Any = None
        """The run's `Plan`, where one was made."""
        self.model: PreTrainedModel | None = None
        self.files: list[str] = []
        """The checkpoint's, of tensors."""
        self.offload = "cpu"
        """ "cpu" or "disk": where the full-precision weights are."""
        self.fused: dict[str, nn.Module] = {}
        """Experts modules that were taken apart, by name, as they were."""

    @property
    def recipe(self) -> AwqOffloadConfig:
        """The config while it is a recipe: until the model is quantized."""
        assert isinstance(self.quantization_config, AwqOffloadConfig)
        return self.quantization_config

    @property
    def checkpoint(self) -> AwqCheckpointConfig | PackedCheckpointConfig:
        """The config once it is a checkpoint's: of a model that was loaded quantized, or has been quantized."""
        assert isinstance(self.quantization_config, AwqCheckpointConfig | PackedCheckpointConfig)
        return self.quantization_config

    # -- before loading ------------------------------------------------------------------------------------------

    def update_device_map(self, device_map: Any) -> Any:
        """Full-precision weights go to the CPU; where the user wants the quantized model is kept for the end."""
        if self.pre_quantized:
            return device_map
        if isinstance(device_map, str):
            return device_map  # transformers resolves it for the quantized sizes, then asks validate_environment
        if device_map is not None:
            self._keep_final_device_map(device_map)
        return {"": "disk" if self.recipe.offload == "disk" or self._result_on_disk else "cpu"}

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """transformers calls this again with the map it resolved from "auto": kept; loading goes to the CPU."""
        if self.pre_quantized or not isinstance(device_map, dict) or self.final_device_map is not None:
            return
        if "weights_only" not in kwargs:
            self._keep_final_device_map(device_map)
            self.offload = chosen_offload(self.recipe, self.files, self._result_on_disk)
            device_map.clear()
            device_map[""] = self.offload

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element that a weight will take once quantized, so that device_map="auto" fits the result."""
        module_name, _, parameter = param_name.rpartition(".")
        if self.pre_quantized or parameter != "weight" or module_name not in self.quantizable:
            return super().param_element_size(model, param_name, param)
        return self.quantized_element_bytes(module_name, param)

    def quantized_element_bytes(self, module_name: str, weight: torch.Tensor) -> float:
        """Bytes per element of a weight (..., in) once it is quantized, with scales and zero points."""
        grid = self.recipe.grid(module_name, weight.shape[-1], weight.dtype)
        bits_of_group = 16 + grid.bits  # scale and zero point
        return (grid.bits + bits_of_group / grid.group_size) / 8

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.model = model
        peft.register()
        if self.pre_quantized:
            headers = read_headers(kwargs.get("checkpoint_files"))
            unfused = meta_of(model, self.checkpoint).get("unfused_experts", False)
            self._unfuse_experts(model, all_kinds=unfused)
            replace_linears(model, self.checkpoint, headers, self._skipped(model))
            if isinstance(self.checkpoint, PackedCheckpointConfig):
                model.config.quantization_config = self.checkpoint  # as saved, not as the library parses it
            return
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelStructureError(
                f"{type(model).__name__} is an encoder-decoder model; supported are decoder-only models "
                "(AutoModelForCausalLM, AutoModelForImageTextToText)."
            )
        prepare_folder(self.recipe.report_dir)
        self._choose_place(kwargs.get("device_map"), kwargs.get("checkpoint_files"))
        self._unfuse_experts(model, all_kinds=False)
        stays_on_disk(model, self)
        self._choose_linears(model)
        if not self.quantizable and not any(map(is_fused_experts, model.modules())):
            raise ModelStructureError(
                f"No linear of {type(model).__name__} can be quantized with this config. Left out: "
                f"{_list_reasons(self.left_out)}. Try another group_size, or fewer modules_to_not_convert."
            )
        if self.recipe.needs_calibration:
            vocab_size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
            with torch.device("cpu"):  # transformers builds the model, and calls this, under the meta device
                self.calibration = load_calibration_set(
                    self.recipe,
                    load_tokenizer=lambda: AutoTokenizer.from_pretrained(_source(model, "tokenizer")),
                    load_processor=lambda: AutoProcessor.from_pretrained(_source(model, "processor")),
                    vocab_size=vocab_size,
                    accepts=forward_arguments(model),
                    placeholders=placeholder_ids(model),
                )

    # -- after loading -------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            self._finish_loading(model)
            return model
        if is_only_loading():
            return model
        weights = detach_stored_weights(model) if self.offload == "disk" else None
        offload = offload_folder_of(weights, self.final_device_map)
        with closing(self.prepare(model, weights, offload=offload)) as place:
            self.quantize(model, place)
            place.onloader.load_rest(stays=lambda name: offload is not None and offload.has(name))
        if weights is not None and offload is not None:
            dispatch_with_disk(model, weights, offload)
        elif self.final_device_map is not None:
            dispatch(model, self.final_device_map)
        return model

    def prepare(
        self,
        model: PreTrainedModel,
        weights: StoredWeights | None = None,
        to_checkpoint: ToCheckpoint | None = None,
        offload: OffloadFolder | None = None,
    ) -> Workplace:
        """Settle which linears of `model` are quantized, and where; see `open_workplace`."""
        self._unfuse_experts(model, all_kinds=True)
        self._choose_linears(model)
        if weights is not None:
            weights.take_experts_apart(model, self.fused)
        files = [Path(file) for file in self.files]
        return open_workplace(model, self.recipe, self.calibration, weights, to_checkpoint, files, offload)

    def quantize(self, model: PreTrainedModel, place: Workplace, undo: Undo | None = None) -> None:
        """Quantize `model` in place, once prepared, and make its config that of an AWQ checkpoint."""
        recipe = self.recipe
        self._warn_of_unpackable()
        self.report = quantize_layers(model, recipe, place, self.quantizable.__contains__, self.calibration, undo)
        self.left_out |= self.report.left_out
        self.report.left_out = dict(self.left_out)
        for module in model.modules():
            if isinstance(module, AwqLinear):
                module.backend = recipe.backend
        renaming, left_out = self._renaming(model), sorted(self.left_out)
        meta = self._meta(recipe)
        self.quantization_config = config_of_result(model, recipe, renaming, left_out, meta)
        facts = facts_of(model.config.name_or_path, place.onloader.device, recipe, meta, self.planned)
        write_report(recipe.report_dir, self.report, facts)
        self.calibration = None
        self.pre_quantized = True
        model.config.quantization_config = self.quantization_config
        cast(Any, model).quantization_method = self.quantization_config.quant_method
        accompany(model, self.report, None if isinstance(recipe.tokenizer, str | os.PathLike) else recipe.tokenizer)

    def get_weight_conversions(self) -> list[Any]:
        """Other layouts than GEMM are converted while they load."""
        version = getattr(self.checkpoint, "version", "gemm") if self.pre_quantized else "gemm"
        return [] if version == "gemm" else [to_gemm_converter(version, self)]

    def _finish_loading(self, model: PreTrainedModel) -> None:
        """An AWQ model in memory is in the GEMM layout, and is saved as that."""
        if isinstance(self.checkpoint, AwqCheckpointConfig):
            self.checkpoint.version = "gemm"
        conversions = getattr(model, "_weight_conversions", None) or []
        kept = [entry for entry in conversions if not any(isinstance(op, ToGemm) for op in _operations(entry))]
        cast(Any, model)._weight_conversions = kept
        accompany(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Put plain linears in the place of the quantized ones, where they are."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        offloaded = next((name for name, linear in linears.items() if linear.is_on_meta), None)
        if offloaded is not None:
            raise ConfigError(
                f"{offloaded} is offloaded to the CPU or the disk. Load the model with a device_map without offload, "
                'such as "cpu", to dequantize it.'
            )
        wanted: Any = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving makes config.dtype a name
        for name, linear in linears.items():
            dense = linear.to_dense(wanted or linear.dtype)
            move_hook(linear, dense)
            model.set_submodule(name, dense)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called when `model` is about to be saved: its config names the linears that are dense by now (merged)."""
        if getattr(model, "_hf_peft_config_loaded", False) or not self.pre_quantized:
            return None, {}  # adapters alone are saved
        if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
            self.remove_quantization_config(model)
            return None, {}
        dense = dense_in_spite(model, self.checkpoint, self._renaming(model), self._skipped(model))
        self.checkpoint.leave_out(dense)
        return None, {}

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained; the Trainer asks before it starts.

        Raises:
            ModelStructureError: they can't, because linears are offloaded.
        """
        for name, linear in () if self.model is None else self.model.named_modules():
            if isinstance(linear, QuantizedLinear) and linear.is_offloaded:
                raise ModelStructureError(peft.OFFLOADED.format(name=name))
        return True

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Per-expert weights are loaded and saved one by one; transformers 5.17 does not pass the model."""
        model = model or self.model
        kept = weight_conversions if model is None else conversions_without_merging(weight_conversions, model)
        return kept + self.get_weight_conversions()

    def _unfuse_experts(self, model: PreTrainedModel, all_kinds: bool) -> None:
        """Take fused experts apart where the checkpoint holds them one by one; with `all_kinds`, also where not."""
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, module in list(model.named_modules()):
            if is_fused_experts(module):
                if any(f"{name}.{fused}" in (*tied, *tied.values()) for fused in fused_names(module)):
                    raise ModelStructureError(
                        f"{name} of {type(model).__name__} shares its experts with other layers; supported are experts "
                        "of a single layer."
                    )
                projections = original_projections(name, module, conversions)
                if projections is not None or all_kinds:
                    self.fused[name] = module
                    model.set_submodule(name, unfused(module, projections))
        if getattr(model, "_weight_conversions", None):
            cast(Any, model)._weight_conversions = self.update_weight_conversions(model._weight_conversions, model)

    def _choose_place(self, device_map: Any, checkpoint_files: Sequence[str] | None) -> None:
        """RAM or disk for the full-precision weights; transformers loads by `device_map`, which is changed in place."""
        self.files = list(checkpoint_files or ())
        self.offload = chosen_offload(self.recipe, self.files, self._result_on_disk)
        if isinstance(device_map, dict):
            device_map[""] = self.offload

    @property
    def _result_on_disk(self) -> bool:
        return "disk" in (self.final_device_map or {}).values()

    # -- which linears -------------------------------------------------------------------------------------------

    def _choose_linears(self, model: PreTrainedModel) -> None:
        self.left_out = self._linears_left_out(model)
        self.quantizable = frozenset(name for name in _linears_in_layers(model) if name not in self.left_out)
        if not any(map(is_fused_experts, model.modules())):  # else there are linears to come
            check_that_all_match(self.recipe.overrides or {}, self.quantizable, self.left_out)

    def _linears_left_out(self, model: PreTrainedModel) -> dict[str, str]:
        """Every linear of the model that stays in full precision -> why."""
        config = self.recipe
        in_layers = _linears_in_layers(model)
        skipped = self._modules_not_converted(model, config.modules_to_not_convert)
        chosen = config.modules_to_not_convert or []
        routers = {
            f"{layer_name}.{name}"
            for layer_name, layer in candidate_layers(model).items()
            for name in router_linears(layer)
        }
        renaming = self._renaming(model)
        linear_type = linear_class(config.checkpoint_format)
        left_out = {}
        for name, linear in model.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            group_size = config.choice(name).group_size
            unpackable = linear_type.unpackable_reason(linear.in_features, linear.out_features, group_size)
            if not should_convert_module(name, chosen):
                left_out[name] = "named in modules_to_not_convert"
            elif name in routers:
                left_out[name] = "chooses experts"
            elif not is_linear(linear):
                left_out[name] = f"a {type(linear).__name__}, which computes more than a product"
            elif name not in in_layers:
                left_out[name] = "outside the decoder layers"
            elif not renaming.keeps(name, linear_type.NAMES.all):
                left_out[name] = "its name does not survive transformers' renaming of weights"
            elif not should_convert_module(name, skipped):
                left_out[name] = "tied, last, or kept in fp32 by the model"
            elif unpackable is not None:
                left_out[name] = unpackable
        return left_out

    def _renaming(self, model: PreTrainedModel) -> Renaming:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        return Renaming(self.update_weight_conversions(conversions, model))

    def _modules_not_converted(self, model: PreTrainedModel, chosen: list[str] | None) -> list[str]:
        """Name patterns that transformers' own AWQ loader leaves in full precision, `chosen` among them."""
        return self.get_modules_to_not_convert(
            model,
            chosen,
            getattr(model, "_keep_in_fp32_modules", None),
            add_default_skips=True,
        )

    def _skipped(self, model: PreTrainedModel) -> list[str]:
        """Name patterns of linears that AWQ loaders leave in full precision, the checkpoint's among them."""
        return self._modules_not_converted(model, getattr(self.checkpoint, "modules_to_not_convert", None))

    # -- odds and ends of one run ----------------------------------------------------------------------------------

    def _keep_final_device_map(self, device_map: DeviceMap) -> None:
        self.final_device_map = dict(device_map)

    def _warn_of_unpackable(self) -> None:
        unpackable = {name: reason for name, reason in self.left_out.items() if "multiple of" in reason}
        if unpackable:
            logger.warning(
                f"{len(unpackable)} linears stay in full precision because their shape does not fit the layout: "
                f"{_list_reasons(unpackable)}."
            )

    def _meta(self, recipe: AwqOffloadConfig) -> dict[str, Any]:
        """How the checkpoint was made; the data set by name or hash, never its text."""
        meta: dict[str, Any] = {"quantizer": [f"hf_awq_offload:{version('hf_awq_offload')}"], "seed": recipe.seed}
        if self.calibration is not None:
            meta |= {
                "dataset": self.calibration.name,
                "n_samples": len(self.calibration),
                "max_seq_len": recipe.max_seq_len,
                "calibration_tokens": self.calibration.tokens,
            }
        if self.fused:
            meta["unfused_experts"] = True  # they are loaded one by one, also where the original holds them fused
        search = {name: getattr(recipe, name) for name in ("n_grid", "duo_scaling", "clip", "rounding", "propagate")}
        return meta | search


def _linears_in_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside the model's decoder layers by its full name."""
    return {
        f"{layer_name}.{name}": linear
        for layer_name, layer in candidate_layers(model).items()
        for name, linear in linears_in(layer).items()
    }


def _operations(conversion: Any) -> list[Any]:
    """Of a converter; a renaming has none."""
    return getattr(conversion, "operations", [])


def _source(model: PreTrainedModel, what: str) -> str:
    """Where the model comes from, and so its tokenizer or processor."""
    source = model.config.name_or_path
    if not source:
        raise CalibrationDataError(
            f"A {what} is needed for the calibration data and the model does not say where its own is; pass "
            "tokenizer=..., or a dataset of token ids or of a processor's outputs."
        )
    return source


def _list_reasons(left_out: dict[str, str], most: int = 8) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(left_out.items())[:most]]
    return ", ".join(shown) + (f" and {len(left_out) - most} more" if len(left_out) > most else "")
