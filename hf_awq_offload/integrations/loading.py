"""Loads a quantized checkpoint into a transformers model: replaces linears, maps names, converts other layouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.quantizers_utils import should_convert_module

from ..checkpoint.layout_checks import LinearFeatures, TensorHeader, check_linear, packed_prefixes
from ..errors import CheckpointError
from ..formats.awq import PackedWeight
from ..formats.awq_config import AwqCheckpointConfig
from ..formats.awq_variants import to_gemm
from ..formats.compressed_tensors_config import PackedCheckpointConfig
from ..formats.grid import Grid, resolve_group_size
from ..formats.grid_choice import GridChoice
from ..formats.layouts import AWQ_NAMES, find_tensors, spellings_of
from ..formats.name_patterns import found_at_start, is_quick
from ..nn.registry import linear_class

BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
"""Ends what an entry of modules_to_not_convert matches, in transformers' `should_convert_module`."""


def replace_linears(
    model: PreTrainedModel,
    config: AwqCheckpointConfig | PackedCheckpointConfig,
    headers: dict[str, TensorHeader] | None,
    skipped: list[str],  # name patterns that AWQ loaders leave in full precision
) -> None:
    """Replaces every linear that the checkpoint holds packed by a quantized linear on the meta device.

    The files' headers decide which linears those are, and are checked. Without headers, config.json decides.

    Raises:
        CheckpointError: config.json, the model and the headers contradict each other.
    """
    linear_type = linear_class(config.quant_method.value)
    prefixes = {} if headers is None else names_in_model(model, packed_prefixes(headers, linear_type.NAMES.integers))
    stored = {name: prefix for prefix, name in prefixes.items()}
    dense = set() if headers is None else set(names_in_model(model, packed_prefixes(headers, "weight")).values())
    replaced = 0
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        if name not in stored and name in dense:
            continue
        prefix = stored.get(name, name)
        choice = choice_in(config, name, prefix, linear, [] if name in stored else skipped)
        if choice is None and name not in stored:
            continue
        if choice is None:
            raise _left_out_in_spite(name)
        reason = linear_type.unpackable_reason(linear.in_features, linear.out_features, choice.group_size)
        if reason is not None:
            raise CheckpointError(
                f"config.json says that {name} is quantized, but its {reason}. Expected it among the modules that "
                "config.json leaves out; correct config.json or quantize again."
            )
        grid = Grid(choice.bits, resolve_group_size(choice.group_size, linear.in_features), choice.zero_point)
        features = LinearFeatures(linear.in_features, linear.out_features, linear.bias is not None)
        packed = linear_type(*features, grid, linear.weight.dtype, device="meta")
        if headers is not None:
            packed.set_scale_dtype(check_linear(prefix, features, headers, config.layout, grid))
        model.set_submodule(name, packed)
        replaced += 1
    if not replaced:
        left_out = (
            f"ignore is {config.ignore}"
            if isinstance(config, PackedCheckpointConfig)
            else f"modules_to_not_convert is {config.modules_to_not_convert}"
        )
        raise CheckpointError(
            f"config.json says quant_method {config.quant_method.value!r}, but it names no linear of "
            f"{type(model).__name__} as quantized: {left_out}."
        )


def choice_in(
    config: AwqCheckpointConfig | PackedCheckpointConfig,
    name: str,  # in the model
    prefix: str,  # in the checkpoint
    linear: nn.Linear,
    skipped: list[str],
) -> GridChoice | None:
    """Returns the grid that config.json gives a linear, or None for full precision."""
    if isinstance(config, PackedCheckpointConfig):
        return config.choice_for({name, prefix}, linear)
    slow = [entry for entry in skipped if not is_quick(entry)]
    is_kept = not should_convert_module(name, [entry for entry in skipped if entry not in slow])
    is_kept = is_kept or any(name.endswith(entry) or found_at_start(f"(?:{entry}){BOUNDARY}", name) for entry in slow)
    return None if is_kept else config.choice


def _left_out_in_spite(name: str) -> CheckpointError:
    """The error for a linear that is packed although config.json leaves it out: on which grid is not known."""
    return CheckpointError(
        f"{name} is packed in the checkpoint, but config.json names it in no config group, or in ignore. Correct "
        "config.json, or download the checkpoint again."
    )


def names_in_model(model: PreTrainedModel, prefixes: Iterable[str]) -> dict[str, str]:
    """Maps a linear's name in the checkpoint to its name in the model, renamed as transformers renames weights."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    state = model.state_dict()  # on the meta device: names only
    names = {}
    for prefix in prefixes:
        name, _ = rename_source_key(f"{prefix}.weight", renamings, [], model.base_model_prefix, state)
        names[prefix] = name.removesuffix(".weight")
    return names


def to_gemm_converter(version: str, quantizer: Any) -> WeightConverter:
    """Returns a converter with which transformers turns each linear into the GEMM layout while it loads.

    This also works for linears that go to disk.

    Raises:
        CheckpointError: this release of transformers can't convert several tensors into several others.
    """
    sources = [spelling for name in AWQ_NAMES.all for spelling in spellings_of(name)]
    try:
        return WeightConverter(sources, list(AWQ_NAMES.all), operations=[ToGemm(version, quantizer)])
    except ValueError as error:
        raise CheckpointError(
            f"The checkpoint's AWQ version is {version!r}, which transformers {transformers_version} can't convert "
            "while it loads; expected 'gemm', or transformers 5.23 or later, which can. Upgrade transformers."
        ) from error


def keep_gemm(model: PreTrainedModel, config: AwqCheckpointConfig | PackedCheckpointConfig) -> None:
    """Drops the converters to GEMM once they have done their work: the model is saved in the layout that it has now."""
    if isinstance(config, AwqCheckpointConfig):
        config.version = "gemm"
    conversions = getattr(model, "_weight_conversions", None) or []
    cast(Any, model)._weight_conversions = [
        entry
        for entry in conversions
        if not any(isinstance(operation, ToGemm) for operation in getattr(entry, "operations", []))
    ]


class ToGemm(ConversionOps):
    """Converts the tensors of one linear from the layout `version` to the GEMM layout."""

    supports_many_to_many = True

    def __init__(self, version: str, quantizer: Any):
        self.version = version
        self.hf_quantizer = quantizer  # tells transformers not to cast the tensors first

    def __deepcopy__(self, memo: dict) -> ToGemm:
        return self  # transformers copies the converter for each linear

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        name = kwargs["full_layer_name"]
        linear = kwargs["model"].get_submodule(name.rpartition(".")[0])
        stored_names = find_tensors(self.version, input_dict)
        if len(stored_names) < len(AWQ_NAMES.all):
            raise CheckpointError(
                f"The linear of {name} has only {sorted(input_dict)} in the checkpoint; download it again."
            )
        stored = PackedWeight(**{name: input_dict[pattern][0] for name, pattern in stored_names.items()})
        converted = to_gemm(self.version, stored, linear.scales.shape[0])
        return {pattern: [tensor] for pattern, tensor in converted._asdict().items()}
