"""A callback for transformers' Trainer that quantizes the model when training ends.

The trained model is not touched. Its weights are saved in full precision to a temporary folder beside the checkpoints,
loaded from there by `from_pretrained`, calibrated, quantized layer by layer, and saved as an AWQ checkpoint. For a
while, this takes disk space for another copy of the model, and room for one decoder layer on the accelerator. Rejected:
a copy in memory, which would double the accelerator memory and include what training has wrapped around the model.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import unwrap_model

from .calibration.dataset import READ_FACTOR
from .checkpoint.output_folder import output_folder
from .checkpoint.work_folder import move_into_place
from .config import AwqOffloadConfig, require_recipe
from .errors import CalibrationDataError, ModelStructureError
from .in_memory import quantize_model
from .integrations.hub import describe_origin
from .integrations.linear_choice import renaming_of
from .integrations.module_names import require_known_modules
from .integrations.registration import register
from .integrations.saving import meta_of
from .logs import get_logger
from .model.fused_experts import has_fused_experts
from .report import QuantizationReport
from .reporting.files import prepare_folder

logger = get_logger(__name__)

FOLDER = "awq"
PATIENCE = timedelta(days=7)
"""How long the other ranks wait for the one that quantizes; NCCL's default of ten minutes is too short."""


class AwqQuantizeCallback(TrainerCallback):
    """Quantizes a full-precision model at the end of training, on the data that it was trained on.

    Adapters (a PeftModel) are merged into a copy first; the trained model keeps them. With `load_best_model_at_end`,
    the best model is quantized. In distributed training, rank 0 quantizes and the others wait; if it fails, all ranks
    raise.

    Args:
        config: the recipe. Unless it names a `dataset`, the trainer's own training data is the calibration set: batches
            as the collator makes them, including chat template and packing, without padding. Labels are ignored.
        output_dir: folder for the checkpoint; by default "awq" in the trainer's output_dir.
        push_to_hub: a repository's name, or True for the trainer's `hub_model_id` with "-AWQ" appended, or False; by
            default the trainer's own `push_to_hub`.

    Raises:
        ConfigError, ModelStructureError: before the first step, if the model can't be quantized at the end, the recipe
            names no module of it, or a file is in the checkpoint's place.
    """

    def __init__(
        self,
        config: AwqOffloadConfig,
        output_dir: str | os.PathLike | None = None,
        push_to_hub: bool | str | None = None,
    ):
        require_recipe(config)
        self.config = config
        self.output_dir = output_dir
        self.push_to_hub = push_to_hub
        self.report: QuantizationReport | None = None
        """The report of the quantization, once it is done."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        _require_quantizable(unwrap_model(model), args)
        base = _base(unwrap_model(model))
        if not has_fused_experts(base):  # else there are names to come
            require_known_modules(self.config.modules_to_not_convert or [], base, renaming_of(base))
        output_folder(self._target(args), True, field="output_dir", kept={"report_dir": self.config.report_dir})
        prepare_folder(self.config.report_dir)

    def on_train_end(
        self, args, state, control, model=None, processing_class=None, train_dataloader=None, **kwargs
    ) -> None:
        model = unwrap_model(model)
        recipe = copy.copy(self.config)
        with _Ranks() as ranks:
            if recipe.needs_calibration and recipe.dataset == "builtin":
                recipe.dataset = training_rows(train_dataloader, recipe, ranks.agree)
            ranks.run_on_first(lambda: self._quantize(model, recipe, args, processing_class, train_dataloader))

    def _quantize(
        self, model: nn.Module, recipe: AwqOffloadConfig, args: Any, processing_class: Any, train_dataloader: Any
    ) -> None:
        target = self._target(args)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}-unfinished-", dir=target.parent))
        full_precision = scratch / "full-precision"
        _save_full_precision(model, full_precision)
        if processing_class is not None:
            processing_class.save_pretrained(full_precision)
        try:
            quantized = _quantized_copy(model, recipe, full_precision, args, processing_class)
            describe_origin(quantized, _base_model(model, args), processing_class)
            if self.config.dataset == "builtin" and recipe.needs_calibration:
                _name_data(quantized, train_dataloader)
            quantized.save_pretrained(scratch / "quantized")
            if processing_class is not None:
                processing_class.save_pretrained(scratch / "quantized")
            move_into_place(scratch / "quantized", target, scratch)
        except BaseException:
            logger.error(
                f"Quantizing after training failed. The trained model is unchanged in memory, and saved in full "
                f"precision in {full_precision}: remove the cause, and quantize it with from_pretrained(..., "
                "quantization_config=...)."
            )
            raise
        shutil.rmtree(scratch)
        self.report = cast(Any, quantized).hf_quantizer.report
        logger.info(f"The quantized model is in {target}.")
        repo_id = self._repo_id(args)
        if repo_id is not None:
            cast(Any, quantized).push_to_hub(repo_id, token=args.hub_token, private=args.hub_private_repo)

    def _target(self, args: Any) -> Path:
        return Path(self.output_dir or Path(args.output_dir) / FOLDER)

    def _repo_id(self, args: Any) -> str | None:
        if isinstance(self.push_to_hub, str):
            return self.push_to_hub
        if not (args.push_to_hub if self.push_to_hub is None else self.push_to_hub):
            return None
        return f"{args.hub_model_id or Path(args.output_dir).resolve().name}-AWQ"


def training_rows(
    dataloader: Iterable[Any],
    recipe: AwqOffloadConfig,
    agree: Callable[[bool], bool],  # returns rank 0's value on every rank
) -> list[list[int]]:
    """Returns token ids of training sequences without padding, enough to choose the calibration set from.

    All ranks read in step, because a data loader may share its batches, or its random numbers, between them.

    Raises:
        CalibrationDataError: the batches hold no `input_ids`, or images or sound beside them.
    """
    rows: list[list[int]] = []
    tokens = 0
    for batch in dataloader:
        for row in _rows_of_batch(batch):
            rows.append(row)
            tokens += min(len(row), recipe.max_seq_len)
        wanted = READ_FACTOR * recipe.n_samples
        if agree(len(rows) >= wanted or tokens >= wanted * recipe.max_seq_len):
            break
    return rows


def _rows_of_batch(batch: Any) -> Iterable[list[int]]:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        content = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise CalibrationDataError(
            f"A batch of the training data holds {content}; expected input_ids. Set `dataset` of the AwqOffloadConfig."
        )
    others = [name for name in batch if name in ("pixel_values", "input_features", "pixel_values_videos")]
    if others:
        raise CalibrationDataError(
            f"The training data holds {others[0]} beside input_ids; the callback calibrates on token ids only. Set "
            "`dataset` of the AwqOffloadConfig."
        )
    mask = batch.get("attention_mask")
    is_mask = isinstance(mask, Tensor) and mask.shape == batch["input_ids"].shape  # packed batches have other masks
    for index, token_ids in enumerate(batch["input_ids"]):
        yield (token_ids[mask[index].bool()] if is_mask else token_ids).tolist()  # type: ignore[index]


def _require_quantizable(model: Any, args: Any) -> None:
    """Checks before the first step everything that would make quantization fail after the last.

    Raises:
        ModelStructureError: the model can't be quantized when training ends.
    """
    base = _base(model)
    if not isinstance(base, PreTrainedModel):
        raise ModelStructureError(
            f"AwqQuantizeCallback quantizes a PreTrainedModel or a PeftModel of one; the trainer's model is a "
            f"{type(model).__name__}."
        )
    if getattr(base, "hf_quantizer", None) is not None:
        raise ModelStructureError(
            "The model is quantized already, so AwqQuantizeCallback has nothing to quantize after training. Remove the "
            "callback and save the adapters, or train on the full-precision model."
        )
    if model is base and getattr(base, "_hf_peft_config_loaded", False):
        raise ModelStructureError(
            "The model's adapters were added by add_adapter or load_adapter; AwqQuantizeCallback can merge only those "
            "of a PeftModel. Use peft.get_peft_model(model, config)."
        )
    prompts = [name for name, adapter in getattr(model, "peft_config", {}).items() if adapter.is_prompt_learning]
    if model is not base and prompts:
        raise ModelStructureError(
            f"The adapter {prompts[0]!r} learns a prompt, which can't be merged into weights; expected one like LoRA."
        )
    if is_deepspeed_zero3_enabled() or getattr(args, "fsdp", None):
        raise ModelStructureError(
            "The model's weights are split between ranks (FSDP, or DeepSpeed's ZeRO 3), and AwqQuantizeCallback needs "
            "them whole on rank 0. Save the model with trainer.save_model, and quantize it after training with "
            "from_pretrained(..., quantization_config=AwqOffloadConfig(...))."
        )


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _save_full_precision(model: Any, folder: Path) -> None:
    """Saves the base model's weights under their own names, and adapters, if any, to a subfolder."""
    base = _base(model)
    if base is model:
        model.save_pretrained(folder)
        return
    base.save_pretrained(folder, state_dict=_weights_without_adapters(base))
    model.save_pretrained(folder / "adapter")


def _weights_without_adapters(base: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict as it would be if PEFT had not wrapped layers of `base`."""
    tuners = import_module("peft.tuners.tuners_utils")
    wrappers = import_module("peft.utils.other")
    renamed = {}  # prefix of a wrapped module -> its prefix without the wrapper
    inside = []  # prefixes of wrappers
    for name, module in base.named_modules():
        original = None
        if isinstance(module, tuners.BaseTunerLayer):
            original = "base_layer"
        elif isinstance(module, wrappers.AuxiliaryTrainingWrapper):
            original = "original_module"
        if original is not None:
            inside.append(f"{name}.")
            renamed[f"{name}.{original}."] = f"{name}."
    state = {}
    for key, value in base.state_dict().items():
        prefix = max((name for name in renamed if key.startswith(name)), key=len, default=None)
        if prefix is not None:
            state[renamed[prefix] + key.removeprefix(prefix)] = value
        elif not key.startswith(tuple(inside)):
            state[key] = value
    return state


def _quantized_copy(
    model: Any, recipe: AwqOffloadConfig, folder: Path, args: Any, processing_class: Any
) -> PreTrainedModel:
    """Loads the model in `folder` to the CPU, merges adapters, and quantizes it, in 16 bits if it was trained so."""
    register()
    base = _base(model)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else base.dtype
    if base is model:
        return type(base).from_pretrained(folder, dtype=dtype, quantization_config=recipe)
    dense = type(base).from_pretrained(folder, dtype=base.dtype)
    peft_model = import_module("peft").PeftModel
    active = list(model.active_adapters)
    own = folder / "adapter"
    merged = peft_model.from_pretrained(dense, _adapter_folder(own, active[0]), adapter_name=active[0])
    for name in active[1:]:
        merged.load_adapter(_adapter_folder(own, name), adapter_name=name)
    merged.base_model.set_adapter(active)
    return quantize_model(merged.merge_and_unload().to(dtype), recipe, processing_class)


def _adapter_folder(folder: Path, name: str) -> Path:
    """Returns an adapter's folder: PEFT saves the adapter "default" in `folder` itself, others in subfolders."""
    return folder if name == "default" else folder / name


def _base_model(model: Any, args: Any) -> str | None:
    """Returns the name of the full-precision model: the trained model's repository, or where training started."""
    if args.push_to_hub and args.hub_model_id and "/" in args.hub_model_id:
        return args.hub_model_id
    return _base(model).config.name_or_path


def _name_data(model: Any, dataloader: Any) -> None:
    """Adds the training data's name, if it has one, to the hash of the calibration set in the checkpoint's metadata."""
    info = getattr(getattr(dataloader, "dataset", None), "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    meta = meta_of(model, model.hf_quantizer.checkpoint)
    meta["dataset"] = f"{name or 'training data'} ({meta['dataset']})"


class _Ranks:
    """The processes of distributed training, or just this one. Use as a context manager."""

    def __enter__(self) -> _Ranks:
        is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if is_distributed else None
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def agree(self, value: Any) -> Any:
        """Returns rank 0's value on every rank."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def run_on_first(self, work: Callable[[], None]) -> None:
        """Runs `work` on rank 0 while the others wait.

        Raises:
            RuntimeError: on the other ranks, if `work` failed on rank 0.
        """
        failure: str | None = None
        try:
            if self.group is None or dist.get_rank() == 0:
                work()
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            failure = self.agree(failure)
        if failure is not None:
            raise RuntimeError(f"Rank 0 could not quantize the model. {failure}")
