"""Tells whether Triton can compile and run kernels on a device, by one trial launch (trial.py)."""

from .trial import interpreting, triton_refusal

__all__ = ["interpreting", "triton_refusal"]
