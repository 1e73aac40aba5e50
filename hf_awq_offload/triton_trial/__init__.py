"""Tells whether Triton can compile and run kernels on a device, by one trial launch (trial.py)."""

from .trial import LAUNCH_OPTIONS, interpreting, triton_refusal

__all__ = ["LAUNCH_OPTIONS", "interpreting", "triton_refusal"]
