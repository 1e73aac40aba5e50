"""Tells beforehand whether there are enough calibration tokens for the widest linears.

A gram matrix of T tokens has a rank of at most T. With fewer tokens than input channels, error feedback can move a
weight's error to where the calibration data have nothing: the loss on these data goes to zero and says nothing about
others. The bound is that of least squares with n channels on T tokens, whose mean squared residual is σ²(1 - n/T) on
these tokens and about σ² / (1 - n/T) on others. Their ratio is 0 at T = n and 0.56 at T = ENOUGH · n; error feedback,
which may only choose among integers, fits less.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..model.decoder_layers import candidate_layers
from ..model.experts import expert_parts
from ..model.linears import linears_in
from .dataset import CalibrationSet

ENOUGH = 4
"""Tokens per input channel with which the loss on the calibration data is of the order of that on other data."""


@dataclass(frozen=True)
class TokenShortage:
    """Calibration data with fewer tokens than some linears have input channels."""

    tokens: int  # that enter the statistics
    channels: int  # of the widest linear
    linear: str  # its name
    samples: int  # that would do, of the mean length of those that there are

    def __str__(self) -> str:
        return (
            f"{self.tokens} calibration tokens count, but {self.linear} has {self.channels} input channels. With fewer "
            "tokens than channels, the losses that are reported are not a measure of quality, and the result may be "
            f"worse on other text than they say. About {self.samples} samples of this length would do (n_samples, "
            f"max_seq_len): {ENOUGH} tokens for each channel."
        )


def token_shortage(
    model: nn.Module,
    calibration: CalibrationSet,
    quantizable: Collection[str],  # full names of linears
) -> TokenShortage | None:
    """Returns what is missing for the widest of the linears; None if no linear has more channels than there are tokens.

    Experts are not looked at: how many tokens reach them shows when the model runs (`LayerReport.starved_experts`).
    """
    widths: dict[str, int] = {}
    for layer_name, layer in candidate_layers(model).items():
        of_experts = expert_parts(layer)
        for name, linear in linears_in(layer).items():
            if f"{layer_name}.{name}" in quantizable and name not in of_experts:
                widths[f"{layer_name}.{name}"] = linear.in_features
    widest = max(widths, key=widths.__getitem__, default=None)
    tokens = calibration.counted_tokens
    if widest is None or not tokens or tokens >= widths[widest]:
        return None
    samples = math.ceil(ENOUGH * widths[widest] * len(calibration) / tokens)
    return TokenShortage(tokens, widths[widest], widest, samples)
