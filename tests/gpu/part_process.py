"""The process of a part: gets ready, waits for its turn, runs, and says so.

python -m gpu.part_process PART,… COMMIT [--small] [--simulated]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

from .parts import BY_NAME, Part
from .processes import GO, NO_DEVICE, READY
from .recorder import NotRunError, Recorder


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs parts of the measurements, when it is told to.")
    parser.add_argument("parts")
    parser.add_argument("commit")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--simulated", action="store_true")
    options = parser.parse_args()
    parts = [BY_NAME[name] for name in options.parts.split(",")]
    if options.simulated:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes on few cores wait for each other
        import simulated_gpu

        simulated_gpu.start()
    missing = {part.name: [name for name in ("torch", *part.needs) if find_spec(name) is None] for part in parts}
    for part in parts:
        if not missing[part.name]:
            importlib.import_module(f".{part.name}", __package__)  # takes seconds, touches no device
    if options.simulated:
        from simulated_gpu import triton_stand_ins

        triton_stand_ins.install()
    print(READY, flush=True)
    word, seconds, folder = sys.stdin.readline().split()
    if word != GO:
        raise SystemExit(f"expected {GO}, got {word}")
    end = time.monotonic() + float(seconds)
    failed = False
    for part in parts:
        begun = time.monotonic()
        own = Path(folder) / part.name
        own.mkdir()
        recorder = Recorder(part.name, own, options.small, options.simulated, options.commit, end - begun)
        recorder.begins(end - begun)
        if "torch" in missing[part.name]:
            recorder.failure(NO_DEVICE, f"torch is not installed for {sys.executable}")
        elif missing[part.name]:
            names = missing[part.name]
            recorder.not_run(part.name, f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed")
        else:
            _run(part, recorder)
        recorder.finished(time.monotonic() - begun)
        failed |= recorder.failures > 0
    return int(failed)


def _run(part: Part, recorder: Recorder) -> None:
    import torch

    if not torch.cuda.is_available():
        recorder.failure(NO_DEVICE, "torch.cuda.is_available() is False; --small --simulated runs without a card")
        return
    warnings.simplefilter("ignore")
    with recorder.attempt(part.name):
        try:
            importlib.import_module(f".{part.name}", __package__).run(recorder)
        except NotRunError:
            raise
        except Exception:
            import traceback

            traceback.print_exc()
            raise


if __name__ == "__main__":
    sys.exit(main())
