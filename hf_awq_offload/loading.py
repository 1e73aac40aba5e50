"""Loading an AWQ checkpoint into a model of transformers: names, and the conversion of other layouts on the way in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

from .errors import CheckpointError
from .formats import ZEROS_NAMES, to_gemm
from .packing import PackedWeight

PACKED_NAMES = PackedWeight._fields


def names_in_model(model: PreTrainedModel, prefixes: Iterable[str]) -> dict[str, str]:
    """A linear's name in the checkpoint -> its name in the model, renamed as transformers renames weights."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    state = model.state_dict()  # on the meta device: names only
    names = {}
    for prefix in prefixes:
        name, _ = rename_source_key(f"{prefix}.weight", renamings, [], model.base_model_prefix, state)
        names[prefix] = name.removesuffix(".weight")
    return names


def to_gemm_converter(version: str, quantizer: Any) -> WeightConverter:
    """Has transformers convert each linear to the GEMM layout while it loads, wherever it then goes, the disk too.

    Raises:
        CheckpointError: this release of transformers has no conversion of several tensors into several others.
    """
    sources = ["qweight", *ZEROS_NAMES, "scales"]
    try:
        return WeightConverter(sources, list(PACKED_NAMES), operations=[ToGemm(version, quantizer)])
    except ValueError as error:
        raise CheckpointError(
            f"The checkpoint's AWQ version is {version!r}, which transformers {transformers_version} can't convert "
            "while it loads; expected 'gemm', or transformers 5.23 (known to do it). Upgrade transformers."
        ) from error


class ToGemm(ConversionOps):
    """The tensors of one linear in the layout of `version` -> in the GEMM layout."""

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
        zeros = next((pattern for pattern in ZEROS_NAMES if pattern in input_dict), None)
        if zeros is None or "qweight" not in input_dict or "scales" not in input_dict:
            raise CheckpointError(f"Of the linear of {name} only {sorted(input_dict)} are in the checkpoint.")
        stored = PackedWeight(*(input_dict[pattern][0] for pattern in ("qweight", zeros, "scales")))
        converted = to_gemm(self.version, stored, linear.scales.shape[0])
        return {pattern: [tensor] for pattern, tensor in converted._asdict().items()}
