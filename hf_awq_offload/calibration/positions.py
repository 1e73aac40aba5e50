"""Checks that calibration sequences are no longer than the model has positions."""

from __future__ import annotations

from typing import Any

from ..errors import CalibrationDataError
from .dataset import CalibrationSet


def require_positions(calibration: CalibrationSet, config: Any) -> None:
    """Compares the longest sequence with the config's `max_position_embeddings`, if it has that field.

    Learned positions end there. Rotary ones go on, but the model has never seen them, so its activations are not what
    they will be in use.

    Args:
        calibration: the data.
        config: the model's config, or that of its text decoder.

    Raises:
        CalibrationDataError: a sequence is longer.
    """
    positions = getattr(config, "max_position_embeddings", None)
    longest = max((len(sequence) for sequence in calibration.sequences), default=0)
    if isinstance(positions, int) and 0 < positions < longest:
        raise CalibrationDataError(
            f"Calibration sequences have up to {longest} tokens, but the model has {positions} positions "
            f"(max_position_embeddings); set max_seq_len to {positions} or less."
        )
