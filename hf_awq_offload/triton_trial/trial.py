"""Launches one small Triton kernel per device, and remembers whether that worked.

That Triton can be imported says little: its first launch compiles C code with the system's compiler and Python's
headers, runs an assembler that may not know the GPU, and writes to a cache folder. Any of these may be missing.
"""

from __future__ import annotations

import importlib.util
import os
import threading

import torch

from ..errors import QuantizedWeightError
from ..logs import get_logger
from ..machine_errors import first_line, is_out_of_memory

logger = get_logger(__name__)

LAUNCH_OPTIONS = {"enable_fp_fusion": True}
"""What every launch is given: explicitly, because Triton 3.9 warns about its own default, and 3.10 changes it."""
VALUE = 7  # what the trial writes

_tried: dict[torch.device, str | None] = {}
_lock = threading.Lock()


def triton_refusal(device: torch.device) -> str | None:
    """Returns why Triton can't run kernels on `device`, or None if it can.

    The first call for a device compiles and launches a kernel and waits for it; later calls look the answer up. If
    Triton is installed and does not work, a warning says so once.

    Raises:
        QuantizedWeightError: a CUDA graph is being captured, and the device has not been tried.
        torch.OutOfMemoryError: there is no memory for the trial; the next call tries again.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"its kernels run on CUDA and ROCm, the input is on {device.type!r}"
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    if device not in _tried:
        if torch.cuda.is_current_stream_capturing():
            raise QuantizedWeightError(
                "A CUDA graph is being captured, and no quantized linear has run on this device yet, so that Triton "
                "would have to be tried inside the graph. Expected: a forward pass before the capture, with inputs of "
                "the same shape and dtype."
            )
        with _lock:
            if device not in _tried:
                _tried[device] = _refusal_of_trial(device)
    return _tried[device]


def interpreting() -> bool:
    """Returns whether Triton runs kernels in its interpreter on the CPU, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal_of_trial(device: torch.device) -> str | None:
    """Launches the trial kernel in a thread of its own, which no mode, transform or device of the caller's reaches."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            _launch(device)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="triton-trial")
    thread.start()
    thread.join()
    if not errors:
        return None
    if is_out_of_memory(errors[0]):
        raise errors[0]
    reason = f"triton can't compile a kernel here: {first_line(errors[0]).removesuffix('.')}"
    logger.warning(f"Triton's kernels are unavailable on {device}, and others are slower: {reason}.")
    return reason


def _launch(device: torch.device) -> None:
    """Raises whatever Triton raises, and a RuntimeError if the kernel does not write what it should."""
    from .kernel import trial_kernel

    target = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(target):  # on which Triton launches
        trial_kernel[(1,)](target, VALUE=VALUE, **LAUNCH_OPTIONS)
        if int(target) != VALUE:
            raise RuntimeError(f"a kernel that should write {VALUE} wrote {int(target)}")
