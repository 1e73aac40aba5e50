"""What is settled about a model before it is quantized: the recipe, the data, and which linears it concerns."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from ..calibration.dataset import CalibrationSet, load_calibration_set
from ..calibration.forward_pass import forward_arguments, placeholder_ids
from ..calibration.positions import require_positions
from ..calibration.sufficiency import token_shortage
from ..config import AwqOffloadConfig
from ..errors import CalibrationDataError, ModelStructureError
from ..formats.grid_choice import check_that_all_match
from ..logs import get_logger
from ..messages import shortened
from ..model.fused_experts import has_fused_experts, linears_to_come, stored_fused
from .dense_share import DenseShare
from .linear_choice import linears_in_layers, linears_left_out, renaming_of
from .module_names import require_known_modules
from .origin import PROCESSOR_MARKERS, TOKENIZER_MARKERS, Origin
from .serving import warn_of_readers

logger = get_logger(__name__)


@dataclass(frozen=True)
class Preparation:
    """What of a model is quantized, how, and on which data."""

    recipe: AwqOffloadConfig
    calibration: CalibrationSet | None
    """None where the recipe needs no data."""
    quantizable: frozenset[str]
    """Full names of linears."""
    left_out: dict[str, str]
    """Linear that stays in full precision -> why."""
    stored: Collection[str] = ()
    """Names of tensors in the checkpoint."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, recipe: AwqOffloadConfig, origin: Origin, stored: Collection[str] = ()
    ) -> Preparation:
        """Chooses linears and loads the data for a model whose weights need not be loaded yet.

        Args:
            model: the model.
            recipe: how it is to be quantized.
            origin: where it comes from, and so its tokenizer and processor.
            stored: names of tensors in the checkpoint.

        Raises:
            ConfigError: modules_to_not_convert or overrides name nothing.
            ModelStructureError: no linear can be quantized.
            CalibrationDataError: the data cannot be used.
        """
        chosen = cls(recipe, None, frozenset(), {}, stored).rechosen(model)
        if not chosen.quantizable and not has_fused_experts(model):
            raise ModelStructureError(
                f"No linear of {type(model).__name__} can be quantized with this config. Left out: "
                f"{_listed(chosen.left_out)}. Try another group_size, or fewer modules_to_not_convert."
            )
        if not recipe.needs_calibration:
            return chosen
        calibration = _calibration_set(model, recipe, origin)
        require_positions(calibration, model.config.get_text_config(decoder=True))
        shortage = token_shortage(model, calibration, chosen.quantizable)
        if shortage is not None:
            logger.warning(f"{shortage}")
        return replace(chosen, calibration=calibration)

    def rechosen(self, model: PreTrainedModel) -> Preparation:
        """Returns the same with the linears that the model has now: experts may have been taken apart."""
        left_out = linears_left_out(model, self.recipe)
        quantizable = frozenset(name for name in linears_in_layers(model) if name not in left_out)
        if not has_fused_experts(model):
            self._check_names(model, quantizable, left_out)
        elif all(parameter.is_meta for parameter in model.parameters()):
            self._check_names(model, quantizable, left_out, linears_to_come)
        return replace(self, quantizable=quantizable, left_out=left_out)

    def _check_names(
        self,
        model: PreTrainedModel,
        quantizable: frozenset[str],
        left_out: dict[str, str],
        to_come: Callable[[nn.Module], list[str]] = lambda model: [],  # linears that the model will have
    ) -> None:
        """Raises ConfigError if modules_to_not_convert or overrides name nothing, such as by a typo."""
        chosen, overrides = self.recipe.modules_to_not_convert or [], self.recipe.overrides or {}
        if chosen:
            require_known_modules(chosen, model, renaming_of(model), chain(self.stored_modules, to_come(model)))
        if overrides:
            check_that_all_match(overrides, quantizable.union(to_come(model)), left_out)

    @property
    def stored_modules(self) -> set[str]:
        """Names of modules in the checkpoint."""
        return {name.rpartition(".")[0] for name in self.stored}

    def element_bytes(self, parameter_name: str, parameter: Tensor) -> float:
        """Returns the bytes that an element of a parameter takes once the model is quantized."""
        module_name, _, name = parameter_name.rpartition(".")
        if name != "weight" or module_name not in self.quantizable:
            return parameter.element_size()
        return self.quantized_element_bytes(module_name, parameter)

    def quantized_element_bytes(
        self,
        module_name: str,
        weight: Tensor,  # (..., in)
    ) -> float:
        """Returns the bytes that an element of a weight takes once quantized, with scales and zero points."""
        grid = self.recipe.grid(module_name, weight.shape[-1], weight.dtype)
        bits_of_group = 16 + grid.bits  # scale and zero point
        return (grid.bits + bits_of_group / grid.group_size) / 8

    def warn(self, model: PreTrainedModel, taken_apart: Mapping[str, nn.Module]) -> None:
        """Says what may surprise: linears that stay dense, experts stored in another way, readers that won't load this.

        `taken_apart` holds the experts that are one linear each by now, as they were, by name.
        """
        fused = stored_fused(model, taken_apart)
        if fused:
            logger.warning(
                f"The checkpoint holds the experts of {len(fused)} layers fused ({fused[0]}, …); the result holds one "
                "linear for each expert and projection. This package loads it; stock transformers does not."
            )
        dense = DenseShare.of(model, self.recipe, self.left_out)
        unpackable = {name: reason for name, reason in self.left_out.items() if "multiple of" in reason}
        if unpackable:
            logger.warning(
                f"{len(unpackable)} linears stay in full precision because their shape does not fit the layout: "
                f"{_listed(unpackable)}. In all, {dense.share:.0%} of the decoder layers' weights stay."
            )
        if not {reason for _, reason in dense.dense_elements} <= set(unpackable.values()):
            dense.warn()
        warn_of_readers(self.recipe, self.quantizable, self.left_out)


def require_decoder_only(model: PreTrainedModel) -> None:
    """Raises ModelStructureError for a model with an encoder, before anything else is done."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelStructureError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only models are supported "
            "(AutoModelForCausalLM, AutoModelForImageTextToText)."
        )


def _calibration_set(model: PreTrainedModel, recipe: AwqOffloadConfig, origin: Origin) -> CalibrationSet:
    vocab_size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if isinstance(recipe.tokenizer, str | os.PathLike) and os.fspath(recipe.tokenizer) == origin.source:
        recipe = copy.copy(recipe)
        recipe.tokenizer = None  # it is the model's own: from the model's revision

    def load_own(auto_class: Any, markers: Sequence[str], what: str) -> Any:
        _require_source(origin, what)
        return origin.load(auto_class, markers, model.config)

    with torch.device("cpu"):  # transformers builds the model, and calls this, under the meta device
        return load_calibration_set(
            recipe,
            load_tokenizer=lambda: load_own(AutoTokenizer, TOKENIZER_MARKERS, "tokenizer"),
            load_processor=lambda: load_own(AutoProcessor, PROCESSOR_MARKERS, "processor"),
            vocab_size=vocab_size,
            accepts=forward_arguments(model),
            placeholders=placeholder_ids(model),
            arguments=origin.arguments_elsewhere,
        )


def _require_source(origin: Origin, what: str) -> None:
    """Raises CalibrationDataError if it is not known where the model comes from, and so its tokenizer or processor."""
    if not origin.source:
        raise CalibrationDataError(
            f"A {what} is needed for the calibration data and the model does not say where its own is; pass "
            "tokenizer=..., or a dataset of token ids or of a processor's outputs."
        )


def _listed(left_out: dict[str, str], most: int = 8) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(left_out.items())[:most]]
    return shortened(shown, most)
