"""The plugin: transformers' `HfQuantizer` interface on one side, the pipeline on the other. No maths.

One class does two jobs, told apart by `pre_quantized`:

- a full-precision checkpoint and an `AwqOffloadConfig`: weights are loaded to the CPU or stay on the disk, the model is
  calibrated and quantized, and the small model is dispatched as the caller's `device_map` asked;
- a quantized checkpoint: its linears become quantized ones before the weights are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..calibration.dataset import CalibrationSet
from ..config import AwqOffloadConfig, require_recipe
from ..errors import CheckpointError
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from ..model.expert_names import conversions_without_merging
from ..model.fused_experts import take_experts_apart
from ..nn.awq_linear import choose_backend
from ..nn.quantized_linear import QuantizedLinear
from ..offload.offload_folder import OffloadFolder
from ..offload.stored_weights import StoredWeights
from ..pipeline.layer_context import Undo
from ..pipeline.loop import quantize_layers
from ..pipeline.run_storage import RunStorage, ToCheckpoint, open_run_storage
from ..report import Plan, QuantizationReport
from ..reporting.document import facts_of
from ..reporting.files import prepare_folder, write_report
from . import peft
from .carrying import modules_of
from .dequantizing import dequantize_linears
from .dispatching import dispatch, dispatch_with_disk, offload_folder_of
from .hub import accompany
from .lazy_loading import detach_stored_weights
from .linear_choice import modules_not_converted, renaming_of
from .load_call import is_only_loading, is_only_opening
from .loading import keep_gemm, to_gemm_converter
from .mtp_results import without_mtp
from .origin import Origin, origin_of
from .placement import Placement
from .preparation import Preparation, require_decoder_only
from .quantized_source import prepare_quantized
from .saving import are_unfused_in_source, checkpoint_config, config_of_result, leave_out_dense, meta_of, meta_of_run
from .serving import tensor_parallel_advice
from .source_hooks import end_reading
from .source_look import ModelSource, look_at_source


class AwqOffloadQuantizer(HfQuantizer):
    """Quantizes a model while transformers loads it, or loads a quantized one; `report` says what was done last."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            if isinstance(quantization_config, AwqOffloadConfig):
                raise CheckpointError(
                    "The checkpoint's config.json holds a recipe (quant_method 'awq_offload'), which no finished "
                    "checkpoint does; it was interrupted or edited. Quantize the original again."
                )
            self.quantization_config = checkpoint_config(quantization_config)
        self.placement = None if self.pre_quantized else Placement(self.recipe)
        self.report: QuantizationReport | None = None
        self.model: PreTrainedModel | None = None
        self.source = ModelSource()
        """The checkpoint that is quantized."""
        self.origin = Origin("")
        self.fused: dict[str, nn.Module] = {}
        """Experts modules that were taken apart, as they were, by name; kept until the model is quantized."""
        self._preparation: Preparation | None = None

    @property
    def recipe(self) -> AwqOffloadConfig:
        """The config while it is a recipe: until the model is quantized."""
        return require_recipe(self.quantization_config, "quantization_config")

    @property
    def checkpoint(self) -> AwqCheckpointConfig | PackedCheckpointConfig:
        """The config once it is a checkpoint's: after the model was loaded quantized, or has been quantized."""
        assert isinstance(self.quantization_config, AwqCheckpointConfig | PackedCheckpointConfig)
        return self.quantization_config

    @property
    def preparation(self) -> Preparation:
        """What is quantized, and on which data: from before the weights are loaded until the model is quantized."""
        assert self._preparation is not None
        return self._preparation

    # -- before loading ------------------------------------------------------------------------------------------

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self.placement is None else self.placement.loading_map(device_map)

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Is called once more with the map that transformers has resolved from "auto", then without `weights_only`."""
        if self.placement is not None and isinstance(device_map, dict) and "weights_only" not in kwargs:
            self.placement.redirect(device_map)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Returns the bytes per element of the quantized weight, so that device_map="auto" fits the result."""
        if self._preparation is None:
            return super().param_element_size(model, param_name, param)
        return self._preparation.element_bytes(param_name, param)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.model, files = model, kwargs.get("checkpoint_files")
        self.origin = origin_of(model, files)
        peft.register()
        if self.placement is None:
            self._take_experts_apart(model, meta_of(model, self.checkpoint).get("unfused_experts", False))
            self.source = prepare_quantized(model, self, self.checkpoint, files, self._skipped(model))
            return
        require_decoder_only(model)
        placement = self.placement
        take_apart = partial(self._take_experts_apart, model, are_unfused_in_source(model))
        self.source = look_at_source(model, self, self.recipe, files, lambda: placement.is_lazy, take_apart)
        placement.choose(kwargs.get("device_map"), files, self.source.opened)
        prepare_folder(self.recipe.report_dir)
        if not is_only_opening():
            self._preparation = Preparation.of(model, self.recipe, self.origin, self.source.names)

    def _take_experts_apart(self, model: PreTrainedModel, all_kinds: bool, stored: Collection[str] = ()) -> None:
        self.fused |= take_experts_apart(model, all_kinds, stored)
        if getattr(model, "_weight_conversions", None):
            cast(Any, model)._weight_conversions = self.update_weight_conversions(model._weight_conversions, model)

    # -- quantizing ----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.placement is None:
            keep_gemm(model, self.checkpoint)
            accompany(model, self.origin, carried=self.source.carried)
            return model
        end_reading()
        if is_only_loading():
            return model
        weights = detach_stored_weights(model, self.source.opened) if self.placement.offload == "disk" else None
        device_map = self.placement.final_device_map
        offload = offload_folder_of(weights, device_map, None if self.source.mtp is None else self.source.mtp.name)
        with closing(self.prepare(model, weights, offload=offload)) as storage:
            self.quantize(model, storage)
            storage.onloader.load_remaining(except_for=lambda name: offload is not None and offload.has(name))
        if weights is not None and offload is not None:
            dispatch_with_disk(model, weights, offload)
        elif device_map is not None:
            dispatch(model, device_map)
        return model

    def restrict(self, calibration: CalibrationSet | None, **changes: Any) -> None:
        """Changes the data and fields of the recipe before the model is prepared: a planner tries a part of a run."""
        recipe = copy.copy(self.recipe)
        recipe.update(**changes)
        self.quantization_config = recipe
        self._preparation = replace(self.preparation, recipe=recipe, calibration=calibration)

    def prepare(
        self,
        model: PreTrainedModel,
        weights: StoredWeights | None = None,
        to_checkpoint: ToCheckpoint | None = None,
        offload: OffloadFolder | None = None,
        is_kept: bool = True,
    ) -> RunStorage:
        """Takes all experts apart and opens the run's storage; see `open_run_storage`."""
        self._take_experts_apart(model, all_kinds=True)
        self._preparation = self.preparation.rechosen(model)
        if weights is not None:
            weights.take_experts_apart(model, self.fused)
        files = [] if self.placement is None else self.placement.files
        calibration, name = self.preparation.calibration, self.source.format_name
        return open_run_storage(model, self.recipe, calibration, weights, to_checkpoint, files, offload, name, is_kept)

    def quantize(
        self, model: PreTrainedModel, storage: RunStorage, undo: Undo | None = None, planned: Plan | None = None
    ) -> QuantizationReport:
        """Quantizes the prepared model in place, and makes its config that of a quantized checkpoint.

        Args:
            model: the model that was prepared.
            storage: what `prepare` returned.
            undo: takes what brings the model back to what it was.
            planned: what the run was expected to take, for the report.
        """
        recipe, preparation = self.recipe, self.preparation
        preparation.warn(model, self.fused)
        is_quantizable, mtp = preparation.quantizable.__contains__, self.source.mtp
        report = quantize_layers(model, recipe, storage, is_quantizable, preparation.calibration, undo, mtp=mtp)
        report.left_out = preparation.left_out | report.left_out
        report.tensor_parallel = tensor_parallel_advice(model, recipe)
        choose_backend(model, recipe.backend)
        meta = meta_of_run(recipe, preparation.calibration, bool(self.fused), self.source.format)
        self.quantization_config = config_of_result(model, recipe, meta, modules_of(self.source.carried))
        self.source = without_mtp(model, self.source, report, storage.is_streamed)
        facts = facts_of(model.config.name_or_path, storage.onloader.device, recipe, meta, planned)
        write_report(recipe.report_dir, report, facts)
        self.report, self.pre_quantized = report, True
        self._preparation = self.placement = None  # with the data set, which must not travel with the model
        self.fused = {}
        model.config.quantization_config = self.quantization_config
        cast(Any, model).quantization_method = self.quantization_config.quant_method
        accompany(model, self.origin, report, recipe.tokenizer, self.source.carried)
        return report

    # -- a quantized model ---------------------------------------------------------------------------------------

    def get_weight_conversions(self) -> list[Any]:
        """Returns what converts other AWQ layouts to GEMM while they load."""
        version = getattr(self.checkpoint, "version", "gemm") if self.pre_quantized else "gemm"
        return [] if version == "gemm" else [to_gemm_converter(version, self)]

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Has per-expert weights loaded and saved one by one; transformers 5.17 does not pass the model."""
        model = model or self.model
        kept = weight_conversions if model is None else conversions_without_merging(weight_conversions, model)
        return kept + self.get_weight_conversions()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize_linears(model, dtype)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Brings the config up to date before `model` is saved: linears that were merged are dense by now."""
        only_adapters = getattr(model, "_hf_peft_config_loaded", False)
        if self.pre_quantized and not only_adapters:
            if any(isinstance(module, QuantizedLinear) for module in model.modules()):
                leave_out_dense(model, self.checkpoint, renaming_of(model), self._skipped(model))
            else:
                self.remove_quantization_config(model)
        return None, {}

    def _skipped(self, model: PreTrainedModel) -> list[str]:
        """Returns name patterns of linears that AWQ loaders leave in full precision, the checkpoint's among them."""
        return modules_not_converted(model, getattr(self.checkpoint, "modules_to_not_convert", None))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained; the Trainer asks before it starts. Errors: `peft.require_onloaded`."""
        if self.model is not None:
            peft.require_onloaded(self.model)
        return True
